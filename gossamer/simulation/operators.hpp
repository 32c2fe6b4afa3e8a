// The operators that programs of domains call (gossamer/engine/domain.py, gossamer/engine/kernels/ops.py), for processes without Python.
//
// On the CPU kernels are libraries of the package. On GPUs they are inside the program; what is left are exchange, sorting and maps of
// elements, made of operations that PyTorch has on every device.
#pragma once

#include <dlfcn.h>
#include <mpi.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

using at::Tensor;
using std::string;

// --- where tensors are ------------------------------------------------------------------------------------------------

// The processor, or one GPU. LAMMPS and MPI see the memory of the host; an MPI that reads the memory of GPUs may be given that.
struct Device {
  c10::Device place{at::kCPU};
  bool direct = false;  // MPI is given the memory of the GPU

  Tensor here(const Tensor &t) const { return t.to(place); }

  // What MPI can send from; the device has finished whatever came before.
  Tensor readable(const Tensor &t) const {
    if (t.is_cpu()) return t;
    if (!direct) return t.to(at::kCPU);
    c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).synchronize();
    return t;
  }

  // What MPI can write into, in the place of the tensor.
  Tensor writable(const Tensor &t) const {
    return t.is_cpu() || direct ? t : at::empty(t.sizes(), t.options().device(at::kCPU).pinned_memory(true));
  }
};

// --- features of other processes' atoms -------------------------------------------------------------------------------

// Who sends rows of which own atoms to whom; the same for all layers until LAMMPS rebuilds its lists.
struct Exchange {
  MPI_Comm world = MPI_COMM_NULL;
  int64_t others = 0;                         // rows beyond the own ones, grouped by the process that owns them
  std::vector<int> from, from_rows, to, to_rows;  // processes, and rows of each
  Tensor sent;                                // own rows that go out, grouped by process
  Device device;                              // where features are

  // rows of `received` (after those of the processes before) arrive from `a`, rows of `sent_` leave to `b`
  void move(const Tensor &sent_, const std::vector<int> &b, const std::vector<int> &b_rows, Tensor &received, const std::vector<int> &a, const std::vector<int> &a_rows) {
    const Tensor in = device.readable(sent_), out = device.writable(received);
    MPI_Datatype row;
    const int64_t bytes = c10::multiply_integers(in.sizes().slice(1)) * in.element_size();
    MPI_Type_contiguous((int)bytes, MPI_BYTE, &row);
    MPI_Type_commit(&row);
    std::vector<MPI_Request> requests(a.size() + b.size());
    char *place = (char *)out.data_ptr();
    for (size_t k = 0; k < a.size(); k++, place += a_rows[k - 1] * bytes) MPI_Irecv(place, a_rows[k], row, a[k], 0, world, &requests[k]);
    const char *source = (const char *)in.data_ptr();
    for (size_t k = 0; k < b.size(); k++, source += b_rows[k - 1] * bytes) MPI_Isend(source, b_rows[k], row, b[k], 0, world, &requests[a.size() + k]);
    MPI_Waitall((int)requests.size(), requests.data(), MPI_STATUSES_IGNORE);
    MPI_Type_free(&row);
    if (!out.is_same(received)) received.copy_(out);
  }
};
static Exchange *current = nullptr;  // of the call under way; null: a process has everything

static Tensor rows_like(const Tensor &x, int64_t n) {
  auto sizes = x.sizes().vec();
  sizes[0] = n;
  return at::empty(sizes, x.options());
}

static Tensor exchange(const Tensor &x_, const Tensor &nodes, const Tensor &own) {
  const int64_t n = own.size(0), others = nodes.size(0) - n;
  Tensor x = x_.contiguous();
  TORCH_CHECK(others == (current ? current->others : 0), "gossamer: rows of ", others, " atoms of other processes are asked for");
  Tensor out = rows_like(x, n + others);
  out.narrow(0, 0, n).copy_(x);
  if (!current || (current->from.empty() && current->to.empty())) return out;
  Tensor sent = x.index_select(0, current->sent), received = out.narrow(0, n, others);
  current->move(sent, current->to, current->to_rows, received, current->from, current->from_rows);
  return out;
}

static Tensor exchange_backward(const Tensor &g_, const Tensor &nodes, const Tensor &own) {
  const int64_t n = own.size(0), others = nodes.size(0) - n;
  Tensor g = g_.contiguous(), out = g.narrow(0, 0, n).clone();
  if (!current || (current->from.empty() && current->to.empty())) return out;
  Tensor back = rows_like(g, current->sent.size(0)), theirs = g.narrow(0, n, others);
  current->move(theirs, current->from, current->from_rows, back, current->to, current->to_rows);
  return out.index_add_(0, current->sent, back);
}

static Tensor own_rows(const Tensor &x, const Tensor &own) { return x.narrow(0, 0, own.size(0)).clone(); }
static Tensor own_rows_backward(const Tensor &g, const Tensor &nodes) {
  Tensor out = rows_like(g, nodes.size(0)).zero_();
  out.narrow(0, 0, g.size(0)).copy_(g);
  return out;
}

// --- kernels as operators, as in gossamer/engine/kernels/ops.py -------------------------------------------------------

typedef int64_t I;
typedef const int64_t *Index;
typedef const void *In;
typedef void *Out;
struct Kernel {
  void *library = nullptr;
  std::vector<int64_t> sizes;  // convolution: widths in and out, then the layout; polynomial: components out
  template <class F> F function(const char *name) const {
    F found = (F)dlsym(library, name);
    TORCH_CHECK(found, "gossamer: a kernel of the package has no function ", name);
    return found;
  }
};
typedef std::map<string, Kernel> Kernels;
static const Kernels *kernels = nullptr;  // of the package whose program runs
static const Kernel &kernel(const string &key) {
  TORCH_CHECK(kernels, "gossamer: a kernel is called outside a program");
  auto found = kernels->find(key);
  TORCH_CHECK(found != kernels->end(), "gossamer: the package has no kernel ", key);
  return found->second;
}
static Index index_of(const Tensor &t) { return t.data_ptr<int64_t>(); }

static std::tuple<Tensor, Tensor, Tensor> sorted(const Tensor &edges_, I nodes, I own) {
  Tensor edges = edges_.contiguous();
  const I m = edges.size(1);
  Tensor receivers = at::empty({nodes + 1}, edges.options()), senders = at::empty({nodes + 1}, edges.options()), order = at::empty({m}, edges.options());
  kernel("sorting").function<void (*)(I, I, Index, I *, I *, I *)>("sort_edges")(nodes, m, index_of(edges), receivers.data_ptr<I>(), senders.data_ptr<I>(),
                                                                                  order.data_ptr<I>());
  return {receivers.narrow(0, 0, own + 1), senders, order};
}
static std::tuple<Tensor, Tensor, Tensor> sort_edges(const Tensor &edges, const Tensor &nodes) { return sorted(edges, nodes.size(0), nodes.size(0)); }
static std::tuple<Tensor, Tensor, Tensor> sort_own_edges(const Tensor &edges, const Tensor &nodes, const Tensor &own) {
  auto [receivers, senders, order] = sorted(edges, nodes.size(0), own.size(0));
  return {receivers.clone(), senders, order};
}

static Tensor convolve(string key, const Tensor &f_, const Tensor &y_, const Tensor &x_, const Tensor &table_, const Tensor &edges_, const Tensor &receivers,
                       const Tensor &, const Tensor &, const std::optional<Tensor> &first, I intervals) {
  const Kernel &k = kernel(key);
  Tensor f = f_.contiguous(), y = y_.contiguous(), x = x_.contiguous(), table = table_.contiguous(), edges = edges_.contiguous(), out = at::empty({receivers.size(0) - 1, k.sizes[1]}, f.options());
  Tensor row = first ? first->contiguous() : Tensor();
  k.function<void (*)(I, I, I, I, I, I, I, Index, In, In, In, Index, In, Index, Index, Out)>("forward")(
      receivers.size(0) - 1, f.size(0), k.sizes[0], k.sizes[1], intervals ? intervals : table.size(1) - 1, table.size(1), at::get_num_threads(), k.sizes.data() + 2, f.data_ptr(),
      y.data_ptr(), x.data_ptr(), first ? index_of(row) : nullptr, table.data_ptr(), index_of(edges), index_of(receivers), out.data_ptr());
  return out;
}
static std::tuple<Tensor, Tensor, Tensor> convolve_backward(string key, const Tensor &g_, const Tensor &f_, const Tensor &y_, const Tensor &x_, const Tensor &table_,
                                                            const Tensor &edges_, const Tensor &, const Tensor &senders, const Tensor &order,
                                                            const std::optional<Tensor> &first, I intervals) {
  const Kernel &k = kernel(key);
  Tensor g = g_.contiguous(), f = f_.contiguous(), y = y_.contiguous(), x = x_.contiguous(), table = table_.contiguous(), edges = edges_.contiguous();
  Tensor row = first ? first->contiguous() : Tensor(), df = at::empty_like(f), dy = at::empty_like(y), dx = at::empty_like(x);
  k.function<void (*)(I, I, I, I, I, I, I, Index, In, In, In, Index, In, Index, Index, Index, In, Out, Out, Out)>("backward")(
      f.size(0), g.size(0), k.sizes[0], k.sizes[1], intervals ? intervals : table.size(1) - 1, table.size(1), at::get_num_threads(), k.sizes.data() + 2, f.data_ptr(), y.data_ptr(),
      x.data_ptr(), first ? index_of(row) : nullptr, table.data_ptr(), index_of(edges) + edges.size(1), index_of(senders), index_of(order), g.data_ptr(), df.data_ptr(),
      dy.data_ptr(), dx.data_ptr());
  return {df, dy, dx};
}

static Tensor map_by_species(const Tensor &x, const Tensor &species, const Tensor &maps) {
  Tensor out = at::empty({x.size(0), x.size(1), maps.size(2)}, x.options());
  std::vector<std::vector<int64_t>> rows(maps.size(0));
  Tensor s = species.contiguous();
  for (I i = 0; i < s.size(0); i++) rows.at(index_of(s)[i]).push_back(i);
  for (I e = 0; e < maps.size(0); e++) {
    if (rows[e].empty()) continue;
    if ((I)rows[e].size() == x.size(0)) return at::matmul(x, maps[e]);
    Tensor chosen = at::from_blob(rows[e].data(), {(I)rows[e].size()}, at::kLong);
    out.index_copy_(0, chosen, at::matmul(x.index_select(0, chosen), maps[e]));
  }
  return out;
}

typedef void (*Polynomial)(I, I, I, I, Index, In, In, Out);
typedef void (*PolynomialToX)(I, I, I, I, Index, In, In, In, Out);
static Tensor polynomial(string key, const Tensor &x_, const Tensor &species_, const Tensor &k_) {
  Tensor x = x_.contiguous(), species = species_.contiguous(), k = k_.contiguous(), y = at::empty({x.size(0), kernel(key).sizes[0], x.size(2)}, x.options());
  kernel(key).function<Polynomial>("value")(x.size(0), k.size(0), x.size(2), at::get_num_threads(), index_of(species), x.data_ptr(), k.data_ptr(), y.data_ptr());
  return y;
}
static Tensor polynomial_to_x(string key, const Tensor &g_, const Tensor &x_, const Tensor &species_, const Tensor &k_) {
  Tensor g = g_.contiguous(), x = x_.contiguous(), species = species_.contiguous(), k = k_.contiguous(), d = at::empty_like(x);
  kernel(key).function<PolynomialToX>("to_x")(x.size(0), k.size(0), x.size(2), at::get_num_threads(), index_of(species), x.data_ptr(), k.data_ptr(), g.data_ptr(),
                                              d.data_ptr());
  return d;
}

static std::tuple<Tensor, Tensor> attend(I heads, const Tensor &q_, const Tensor &k_, const Tensor &g_, const Tensor &v_, const Tensor &x_, const Tensor &s_,
                                         const Tensor &f_, const Tensor &y_, const Tensor &edges_, const Tensor &receivers, const Tensor &, const Tensor &) {
  Tensor q = q_.contiguous(), k = k_.contiguous(), g = g_.contiguous(), v = v_.contiguous(), x = x_.contiguous(), s = s_.contiguous(), f = f_.contiguous(),
         y = y_.contiguous(), edges = edges_.contiguous();
  Tensor h = at::empty_like(q), out = at::empty({q.size(0), y.size(1), q.size(1)}, q.options());
  kernel("attention").function<void (*)(I, I, I, I, I, In, In, In, In, In, In, In, In, Index, Index, Out, Out)>("attend")(
      q.size(0), q.size(1), f.size(1) / q.size(1), heads, at::get_num_threads(), q.data_ptr(), k.data_ptr(), g.data_ptr(), v.data_ptr(), x.data_ptr(), s.data_ptr(),
      f.data_ptr(), y.data_ptr(), index_of(edges), index_of(receivers), h.data_ptr(), out.data_ptr());
  return {h, out};
}
typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Eight;
static Eight attend_backward(I heads, const Tensor &dh_, const Tensor &dout_, const Tensor &q_, const Tensor &k_, const Tensor &g_, const Tensor &v_, const Tensor &x_,
                             const Tensor &s_, const Tensor &f_, const Tensor &y_, const Tensor &edges_, const Tensor &receivers, const Tensor &senders, const Tensor &order) {
  Tensor dh = dh_.contiguous(), dout = dout_.contiguous(), q = q_.contiguous(), k = k_.contiguous(), g = g_.contiguous(), v = v_.contiguous(), x = x_.contiguous(),
         s = s_.contiguous(), f = f_.contiguous(), y = y_.contiguous(), edges = edges_.contiguous();
  Tensor dq = at::empty_like(q), dk = at::empty_like(k), dg = at::empty_like(g), dv = at::empty_like(v), dx = at::empty_like(x), ds = at::empty_like(s),
         df = at::empty_like(f), dy = at::empty_like(y), scratch = at::empty({edges.size(1), heads}, q.options());
  kernel("attention").function<void (*)(I, I, I, I, I, In, In, In, In, In, In, In, In, Index, Index, Index, Index, Index, In, In, Out, Out, Out, Out, Out, Out, Out, Out, Out)>(
      "attend_backward")(q.size(0), q.size(1), f.size(1) / q.size(1), heads, at::get_num_threads(), q.data_ptr(), k.data_ptr(), g.data_ptr(), v.data_ptr(), x.data_ptr(),
                         s.data_ptr(), f.data_ptr(), y.data_ptr(), index_of(edges), index_of(edges) + edges.size(1), index_of(receivers), index_of(senders), index_of(order),
                         dh.data_ptr(), dout.data_ptr(), dq.data_ptr(), dk.data_ptr(), dg.data_ptr(), dv.data_ptr(), dx.data_ptr(), ds.data_ptr(), df.data_ptr(),
                         dy.data_ptr(), scratch.data_ptr());
  return {dq, dk, dg, dv, dx, ds, df, dy};
}
static Tensor perpendicular(const Tensor &q_, const Tensor &p_, const Tensor &y_, const Tensor &edges_, const Tensor &receivers, const Tensor &, const Tensor &) {
  Tensor q = q_.contiguous(), p = p_.contiguous(), y = y_.contiguous(), edges = edges_.contiguous(), omega = at::empty({edges.size(1), q.size(2)}, q.options());
  kernel("attention").function<void (*)(I, I, I, In, In, In, Index, Index, Out)>("perpendicular")(q.size(0), q.size(2), at::get_num_threads(), q.data_ptr(), p.data_ptr(),
                                                                                                 y.data_ptr(), index_of(edges), index_of(receivers), omega.data_ptr());
  return omega;
}
static std::tuple<Tensor, Tensor, Tensor> perpendicular_backward(const Tensor &g_, const Tensor &q_, const Tensor &p_, const Tensor &y_, const Tensor &edges_,
                                                                 const Tensor &receivers, const Tensor &senders, const Tensor &order) {
  Tensor g = g_.contiguous(), q = q_.contiguous(), p = p_.contiguous(), y = y_.contiguous(), edges = edges_.contiguous();
  Tensor dq = at::empty_like(q), dp = at::empty_like(p), dy = at::empty_like(y);
  kernel("attention").function<void (*)(I, I, I, In, In, In, Index, Index, Index, Index, Index, In, Out, Out, Out)>("perpendicular_backward")(
      q.size(0), q.size(2), at::get_num_threads(), q.data_ptr(), p.data_ptr(), y.data_ptr(), index_of(edges), index_of(edges) + edges.size(1), index_of(receivers),
      index_of(senders), index_of(order), g.data_ptr(), dq.data_ptr(), dp.data_ptr(), dy.data_ptr());
  return {dq, dp, dy};
}

// The same of operations that there are on every device, as in gossamer/engine/kernels/gpu.py; none waits for a GPU.
namespace anywhere {
static std::tuple<Tensor, Tensor, Tensor> sort_own_edges(const Tensor &edges, const Tensor &nodes, const Tensor &own) {
  Tensor sender = edges.select(0, 0), receiver = edges.select(0, 1).contiguous(), order = at::argsort(sender, true, 0, false);
  Tensor atoms = at::arange(nodes.size(0) + 1, edges.options());
  return {at::searchsorted(receiver, atoms.narrow(0, 0, own.size(0) + 1)), at::searchsorted(sender.index_select(0, order), atoms), order};
}
static std::tuple<Tensor, Tensor, Tensor> sort_edges(const Tensor &edges, const Tensor &nodes) { return sort_own_edges(edges, nodes, nodes); }

static Tensor map_by_species(const Tensor &x, const Tensor &species, const Tensor &maps) {
  const I n = x.size(0), dim = x.size(1), elements = maps.size(0), in = maps.size(1), out = maps.size(2), largest = I(1) << 28;
  if (elements * dim <= in) {  // all elements' results are fewer numbers than one matrix
    Tensor results = at::matmul(x, maps.transpose(0, 1).reshape({in, elements * out})).reshape({n, dim, elements, out});
    return results.gather(2, species.reshape({n, 1, 1, 1}).expand({n, dim, 1, out})).squeeze(2);
  }
  const I step = std::max(I(1), largest / (in * out));
  std::vector<Tensor> parts;
  for (I first = 0; first < n; first += step) {
    const I rows = std::min(step, n - first);
    parts.push_back(at::bmm(x.narrow(0, first, rows), maps.index_select(0, species.narrow(0, first, rows))));
  }
  return at::cat(parts);
}
}  // namespace anywhere

#define EDGES "Tensor edge_index, Tensor receiver_starts, Tensor sender_starts, Tensor by_sender"
#define ROWS "Tensor? first_row=None, int intervals=0"
static void register_operators() {
  static std::unique_ptr<torch::Library> library;
  if (library) return;
  library = std::make_unique<torch::Library>(torch::Library::DEF, "gossamer", std::nullopt, __FILE__, __LINE__);
  auto add = [](const char *schema, auto function) { library->def(schema, torch::dispatch(c10::DispatchKey::CPU, function)); };
  add("exchange(Tensor x, Tensor nodes, Tensor own) -> Tensor", exchange);
  add("exchange_backward(Tensor gradient, Tensor nodes, Tensor own) -> Tensor", exchange_backward);
  add("own_rows(Tensor x, Tensor own) -> Tensor", own_rows);
  add("own_rows_backward(Tensor gradient, Tensor nodes) -> Tensor", own_rows_backward);
  add("sort_own_edges(Tensor edge_index, Tensor nodes, Tensor own) -> (Tensor, Tensor, Tensor)", sort_own_edges);
  add("sort_edges(Tensor edge_index, Tensor nodes) -> (Tensor, Tensor, Tensor)", sort_edges);
  add("convolve(str key, Tensor features, Tensor harmonics, Tensor x, Tensor table, " EDGES ", " ROWS ") -> Tensor", convolve);
  add("convolve_backward(str key, Tensor gradient, Tensor features, Tensor harmonics, Tensor x, Tensor table, " EDGES ", " ROWS ") -> (Tensor, Tensor, Tensor)",
      convolve_backward);
  add("map_by_species(Tensor x, Tensor species, Tensor maps) -> Tensor", map_by_species);
  add("polynomial(str key, Tensor x, Tensor species, Tensor k) -> Tensor", polynomial);
  add("polynomial_to_x(str key, Tensor g, Tensor x, Tensor species, Tensor k) -> Tensor", polynomial_to_x);
  add("attend(int heads, Tensor q, Tensor k, Tensor g, Tensor v, Tensor x, Tensor sl, Tensor f, Tensor y, " EDGES ") -> (Tensor, Tensor)", attend);
  add("attend_backward(int heads, Tensor dh, Tensor dout, Tensor q, Tensor k, Tensor g, Tensor v, Tensor x, Tensor sl, Tensor f, Tensor y, " EDGES
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", attend_backward);
  add("perpendicular(Tensor q, Tensor p, Tensor y, " EDGES ") -> Tensor", perpendicular);
  add("perpendicular_backward(Tensor gradient, Tensor q, Tensor p, Tensor y, " EDGES ") -> (Tensor, Tensor, Tensor)", perpendicular_backward);
  auto on_gpus = [](const char *name, auto function) { library->impl(name, torch::dispatch(c10::DispatchKey::CUDA, function)); };
  on_gpus("exchange", exchange);
  on_gpus("exchange_backward", exchange_backward);
  on_gpus("own_rows", own_rows);
  on_gpus("own_rows_backward", own_rows_backward);
  on_gpus("sort_edges", anywhere::sort_edges);
  on_gpus("sort_own_edges", anywhere::sort_own_edges);
  on_gpus("map_by_species", anywhere::map_by_species);
}
