// pair_style gossamer: a package of `gossamer export --to lammps` in LAMMPS, as a plugin. Built by `gossamer lammps build`.
//
// A process runs the program of its domain (gossamer/engine/domain.py) on its own atoms. Between layers the features of neighbours
// that other processes own are exchanged; images of own atoms are own rows, and cost nothing. With the option `halo` there is no exchange:
// ghosts out to all hops are computed beside the own atoms, with weight 0. Forces are gradients with respect to edge vectors at both
// ends of each edge; LAMMPS adds up those of ghosts (newton on). The manifest of the package says where the program runs: on the CPU, or on
// a GPU (gossamer export --device cuda), where its tensors then are; edges come from the host, energies and gradients return to it.
#include <malloc.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/hash.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include "lammps/atom.h"
#include "lammps/comm.h"
#include "lammps/error.h"
#include "lammps/force.h"
#include "lammps/lammps.h"
#include "lammps/memory.h"
#include "lammps/neigh_list.h"
#include "lammps/neighbor.h"
#include "lammps/pair.h"
#include "lammps/update.h"
#include "lammps/utils.h"

#include "operators.hpp"

// --- packages ---------------------------------------------------------------------------------------------------------

static string read(const string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("'" + path + "' cannot be read");
  std::ostringstream all;
  all << file.rdbuf();
  return all.str();
}

// Where a user wants programs to run, and which process of its node this is.
struct Place {
  int gpu = -1, process = 0;  // the GPU; -1: the processes of a node take its GPUs in turn
  bool direct = false;

  Device device(const string &folder, const string &kind) const {
    if (kind == "cpu") {
      if (gpu >= 0 || direct) throw std::runtime_error("'" + folder + "' runs on the CPU: 'gpu' and 'mpi device' are for packages of gossamer export --device cuda");
      return {};
    }
    if (kind != "cuda") throw std::runtime_error("'" + folder + "' is for devices of the kind '" + kind + "', which this plugin does not know: build it with the gossamer that made the package");
    const int count = (int)at::getNumGPUs();
    if (count == 0) throw std::runtime_error("'" + folder + "' runs on GPUs, and here PyTorch (" BUILT_FOR_TORCH ") sees none: run it where a GPU is, or make a package with gossamer export --device cpu");
    if (gpu >= count) throw std::runtime_error("there is no GPU " + std::to_string(gpu) + " on this node: they are numbered from 0 to " + std::to_string(count - 1));
    return {c10::Device(at::kCUDA, (c10::DeviceIndex)(gpu >= 0 ? gpu : process % count)), direct};
  }
};

struct Package {
  double cutoff = 0, tolerance = 0;
  int hops = 0;
  std::map<string, int64_t> elements;
  std::map<string, double> masses;
  Device device;
  Kernels own_kernels;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> program;

  Package(const string &folder, const Place &wanted) {
    const string path = folder + "/manifest.txt", text = read(path);
    const size_t end = text.rfind("checksum ");
    if (text.rfind("gossamer-lammps ", 0) || end == string::npos) throw std::runtime_error("'" + path + "' is not of gossamer export --to lammps");
    if (text.rfind("gossamer-lammps " FORMAT "\n", 0)) throw std::runtime_error("'" + folder + "' is of a format that this plugin does not know: build the plugin with the gossamer that wrote it");
    if (text.substr(end) != "checksum " + c10::sha1(text.substr(0, end)).str() + "\n") throw std::runtime_error("'" + path + "' was damaged or altered: export again");
    std::istringstream lines(text);
    string line, key, kind;
    while (std::getline(lines, line)) {
      std::istringstream words(line);
      words >> key;
      if (key == "cutoff") words >> cutoff;
      else if (key == "hops") words >> hops;
      else if (key == "tolerance") words >> tolerance;
      else if (key == "device") words >> kind;
      else if (key == "torch") need_torch(folder, words);
      else if (key == "processor") need_processor(folder, words);
      else if (key == "element") { string e; words >> e; words >> elements[e] >> masses[e]; }
      else if (key == "file") {
        string sum, name;
        words >> sum >> name;
        if (c10::sha1(read(folder + "/" + name)).str() != sum) throw std::runtime_error("'" + folder + "/" + name + "' was damaged or altered: export again");
      } else if (key == "kernel") load_kernel(folder, words);
    }
    if (!(cutoff > 0 && hops > 0 && tolerance > 0 && !elements.empty())) throw std::runtime_error("'" + path + "' is not complete: export again");
    device = wanted.device(folder, kind);
    program = std::make_unique<torch::inductor::AOTIModelPackageLoader>(folder + "/program.pt2", "model", false, 1, device.place.is_cuda() ? device.place.index() : -1);
    check(folder);
  }

  void need_torch(const string &folder, std::istringstream &words) {
    string version;
    words >> version;
    if (version != TORCH_VERSION) throw std::runtime_error("'" + folder + "' was made with PyTorch " + version + ", this plugin with " TORCH_VERSION ": export again, or gossamer lammps build with the other");
  }

  void need_processor(const string &folder, std::istringstream &words) {
    std::ifstream info("/proc/cpuinfo");
    string line, word;
    while (std::getline(info, line) && line.rfind("flags", 0) && line.rfind("Features", 0)) {}
    std::istringstream here(line);
    std::set<string> has{std::istream_iterator<string>(here), {}};
    while (words >> word)
      if (!has.count(word)) throw std::runtime_error("'" + folder + "' was made for processors with " + word + ", which this one does not have: export on a machine of this kind");
  }

  void load_kernel(const string &folder, std::istringstream &words) {
    Kernel k;
    string name, file;
    words >> name >> file;
    for (int64_t size; words >> size;) k.sizes.push_back(size);
    k.library = dlopen((folder + "/" + file).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!k.library) throw std::runtime_error("a kernel of '" + folder + "' cannot be loaded (" + dlerror() + ")");
    own_kernels[name] = k;
  }

  std::vector<Tensor> run(const Tensor &numbers, const Tensor &edges, const Tensor &vectors, const Tensor &weights, Exchange *exchange) {
    c10::InferenceMode guard;
    current = exchange;
    kernels = &own_kernels;
    c10::OptionalDeviceGuard on;
    if (device.place.is_cuda()) on.reset_device(device.place);
    auto out = program->run({device.here(numbers), device.here(edges), device.here(vectors), device.here(weights)});
    current = nullptr;
    return {out.at(0).to(at::kCPU).contiguous(), out.at(1).to(at::kCPU).contiguous()};
  }

  // the numbers that the potential itself gave for a disordered structure when the package was made
  void check(const string &folder) {
    const string data = read(folder + "/selftest.bin");
    int64_t n, m;
    if (data.size() < 16) throw std::runtime_error("'" + folder + "/selftest.bin' is not complete");
    std::memcpy(&n, data.data(), 8);
    std::memcpy(&m, data.data() + 8, 8);
    if (n < 2 || m < 2 || (int64_t)data.size() != 8 * (2 + 2 * n + 2 * m + 6 * m)) throw std::runtime_error("'" + folder + "/selftest.bin' is not complete");
    const char *p = data.data() + 16;
    auto take = [&p](std::vector<int64_t> sizes, at::ScalarType type) {
      Tensor t = at::empty(sizes, type);
      std::memcpy(t.data_ptr(), p, t.nbytes());
      p += t.nbytes();
      return t;
    };
    Tensor numbers = take({n}, at::kLong), edges = take({2, m}, at::kLong), vectors = take({m, 3}, at::kDouble), energies = take({n}, at::kDouble), slopes = take({m, 3}, at::kDouble);
    auto out = run(numbers, edges, vectors, at::ones({n}, at::kDouble), nullptr);
    const double rms = std::sqrt(slopes.pow(2).mean().item<double>());
    const double off = std::max((out[1] - slopes).abs().max().item<double>() / rms, (out[0] - energies).abs().max().item<double>() / (1 + energies.abs().max().item<double>()));
    if (!(off < tolerance)) {
      std::ostringstream message;
      message << "the program of '" << folder << "' gives other numbers here than the potential it was made from: " << off << " relative, at most " << tolerance << " is rounding. Export on this machine";
      throw std::runtime_error(message.str());
    }
  }
};

// --- the pair style ---------------------------------------------------------------------------------------------------

namespace LAMMPS_NS {

struct Border : Comm {
  using Comm::bordergroup;  // protected: the group whose atoms other processes see
};

class PairGossamer : public Pair {
 public:
  explicit PairGossamer(LAMMPS *lmp) : Pair(lmp) {
    restartinfo = 0;
    manybody_flag = one_coeff = 1;
    single_enable = 0;
    no_virial_fdotr_compute = 1;  // the virial is summed over edges below
    centroidstressflag = CENTROID_NOTAVAIL;
    comm_forward = 2;
  }
  ~PairGossamer() override {
    if (allocated) {
      memory->destroy(setflag);
      memory->destroy(cutsq);
    }
  }

  void settings(int narg, char **arg) override {
    halo = false;
    wanted = {};
    for (int k = 0; k < narg; k++) {
      const string word = arg[k], value = k + 1 < narg ? arg[k + 1] : "";
      if (word == "halo" || word == "exchange") halo = word == "halo";
      else if (word == "mpi" && (value == "host" || value == "device")) wanted.direct = value == "device", k++;
      else if (word == "gpu" && utils::is_integer(value) && value[0] != '-') wanted.gpu = utils::inumeric(FLERR, value, false, lmp), k++;
      else error->all(FLERR, "pair_style gossamer takes 'exchange' (default) or 'halo'; for GPUs 'gpu NUMBER', and 'mpi host' (default) or 'mpi device'; found '{}'", word + (value.empty() ? "" : " ") + value);
    }
    MPI_Comm node;  // the processes that share memory
    MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
    MPI_Comm_rank(node, &wanted.process);
    MPI_Comm_free(&node);
  }

  void coeff(int narg, char **arg) override {
    const int n = atom->ntypes;
    if (narg != 3 + n || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0)
      error->all(FLERR, "pair_coeff of gossamer is: pair_coeff * * PACKAGE and one element for each of the {} atom types", n);
    at::set_num_threads(comm->nthreads);
    string problem;
    try {
      package = std::make_unique<Package>(arg[2], wanted);
    } catch (const std::exception &e) {
      problem = first_line(e);
    }
    int mine = !problem.empty(), all, any;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, world);
    MPI_Allreduce(&mine, &any, 1, MPI_INT, MPI_MAX, world);
    if (all) error->all(FLERR, "gossamer: {}", problem);
    if (mine) error->one(FLERR, "gossamer: {}", problem);
    if (any) MPI_Barrier(world);  // until the process that found it ends all
    if (!allocated) {
      allocated = 1;
      memory->create(setflag, n + 1, n + 1, "pair:setflag");
      memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
    }
    numbers.assign(n + 1, 0);
    symbols.assign(n + 1, "");
    for (int t = 1; t <= n; t++) {
      auto found = package->elements.find(arg[2 + t]);
      if (found == package->elements.end()) {
        string known;
        for (auto &e : package->elements) known += " " + e.first;
        error->all(FLERR, "gossamer: '{}' of atom type {} is not an element of the potential ({})", arg[2 + t], t, known.substr(1));
      }
      numbers[t] = found->second;
      symbols[t] = arg[2 + t];
      for (int s = 1; s <= n; s++) setflag[t][s] = 1;
    }
    if (comm->me == 0)
      utils::logmesg(lmp, "gossamer: '{}' on {}, cutoff {} A, {} hops, {}; its stored numbers are recomputed here\n", arg[2], package->device.place.str(), package->cutoff,
                     package->hops, halo ? "halo of ghosts" : "features are exchanged");
  }

  void init_style() override {
    if (strcmp(update->unit_style, "metal") != 0) error->all(FLERR, "pair_style gossamer gives eV and Angstrom: set units metal, found units {}", update->unit_style);
    if (!force->newton_pair) error->all(FLERR, "pair_style gossamer needs newton on: forces on ghost atoms go to their owners");
    if (atom->molecular != Atom::ATOMIC && !(neighbor_keeps(1) && neighbor_keeps(2) && neighbor_keeps(3)))
      error->all(FLERR, "pair_style gossamer needs all pairs: special_bonds takes bonded ones away. Set special_bonds lj/coul 1.0 1.0 1.0");
    if (comm->mode != Comm::SINGLE) error->all(FLERR, "pair_style gossamer needs comm_modify mode single");
    if (comm->*(&Border::bordergroup)) error->all(FLERR, "pair_style gossamer needs the neighbours of every atom: comm_modify group takes some away. Set comm_modify group all");
    for (int t = 1; t <= atom->ntypes; t++)
      if (atom->mass && atom->mass_setflag && atom->mass_setflag[t] && std::abs(atom->mass[t] - package->masses[symbols[t]]) > 0.05 * package->masses[symbols[t]] && comm->me == 0)
        error->warning(FLERR, "gossamer: atom type {} is {} with a mass of {}, not {}: right if it is an isotope, wrong if pair_coeff names the elements in another order", t,
                       symbols[t], atom->mass[t], package->masses[symbols[t]]);
    neighbor->add_request(this, halo ? NeighConst::REQ_FULL | NeighConst::REQ_GHOST : NeighConst::REQ_FULL);
    if (halo && comm->cutghostuser < reach()) {
      string key = "cutoff", value = std::to_string(reach() + 1e-5);
      char *arguments[2] = {key.data(), value.data()};
      comm->modify_params(2, arguments);
      if (comm->me == 0) utils::logmesg(lmp, "gossamer: ghost atoms reach {} A: {} hops of {} A and the skin\n", value, package->hops, package->cutoff);
    }
  }

  double init_one(int i, int j) override {
    if (!setflag[i][j]) error->all(FLERR, "pair_coeff of gossamer is not set");
    return package->cutoff;
  }

  void compute(int eflag, int vflag) override {
    ev_init(eflag, vflag);
    at::set_num_threads(comm->nthreads);
    if (neighbor->ago == 0 || (int)place.size() != atom->nlocal + atom->nghost) {
      if (comm->get_comm_cutoff() < reach()) error->all(FLERR, "gossamer: ghost atoms reach {} A, {} are needed: raise comm_modify cutoff", comm->get_comm_cutoff(), reach());
      check_complete();
      if (!halo) plan();
    }
    if (halo) surround();
    else gather();
    if (atom->nlocal == 0) return;
    std::vector<Tensor> out;
    try {
      out = evaluate();
    } catch (const std::exception &e) {
      error->one(FLERR, "gossamer: {}", first_line(e));
    }
    const double *energy = out[0].data_ptr<double>();
    double total = 0;
    for (int i = 0; i < atom->nlocal; i++) {
      total += energy[i];
      if (eflag_atom) eatom[i] += energy[i];
    }
    if (!std::isfinite(total)) error->one(FLERR, "gossamer: the energy is not finite at step {}: do two atoms lie on one another?", update->ntimestep);
    if (eflag_global) eng_vdwl += total;
    spread(out[1].data_ptr<double>());
  }

  int pack_forward_comm(int n, int *list, double *buffer, int, int *) override {
    for (int k = 0; k < n; k++) {
      buffer[2 * k] = owner[2 * list[k]];
      buffer[2 * k + 1] = owner[2 * list[k] + 1];
    }
    return 2 * n;
  }
  void unpack_forward_comm(int n, int first, double *buffer) override { std::copy(buffer, buffer + 2 * n, owner.begin() + 2 * first); }

  double memory_usage() override { return (double)(sizeof(double) * 3 + sizeof(int) * 2) * centre.capacity() + 24.0 * place.size(); }

 private:
  bool halo = false;
  Place wanted;
  std::unique_ptr<Package> package;
  std::vector<int64_t> numbers;   // of each atom type
  std::vector<string> symbols;
  Exchange exchanged;
  std::vector<double> owner;      // of each atom here: process and its index there
  std::vector<int64_t> place;     // of each atom here: its own row, or -1 - its place among other processes' rows
  std::vector<int> others;        // for each other row, one of its ghosts here
  std::vector<int> atoms;         // of each row that is computed, in a halo
  std::vector<int> centre, neighbour;  // atoms of each edge
  std::vector<int64_t> sender, receiver;  // rows of each edge; other rows as in `place`
  std::vector<double> vectors;

  static string first_line(const std::exception &e) {
    string text = e.what();
    return text.substr(0, text.find('\n'));
  }
  bool neighbor_keeps(int k) const { return force->special_lj[k] != 0.0 || force->special_coul[k] != 0.0; }
  double reach() const { return (halo ? package->hops : 1) * package->cutoff + neighbor->skin; }

  // Only lists that are built say what they lack; fixes that exclude pairs ask for that after init_style.
  void check_complete() {
    if (neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol)
      error->all(FLERR, "pair_style gossamer needs all pairs: neigh_modify exclude, or a fix that uses it (gcmc full_energy), takes some away");
    if (list->iskip) error->all(FLERR, "pair_style gossamer needs all pairs: hybrid gives some to other styles. Add styles with hybrid/overlay");
  }

  // Which rows other processes own, and who sends what to whom.
  void plan() {
    const int nlocal = atom->nlocal, nall = nlocal + atom->nghost;
    owner.resize(2 * nall);
    for (int i = 0; i < nlocal; i++) owner[2 * i] = comm->me, owner[2 * i + 1] = i;
    comm->forward_comm(this);
    std::map<std::pair<int, int>, int> wanted;  // process and index there -> a ghost here
    std::vector<char> seen(nall, 0);
    for (int k = 0; k < list->inum; k++) {
      const int i = list->ilist[k];
      for (int a = 0; a < list->numneigh[i]; a++) {
        const int j = list->firstneigh[i][a] & NEIGHMASK;
        if (seen[j]) continue;
        seen[j] = 1;
        if ((int)owner[2 * j] != comm->me) wanted.insert({{(int)owner[2 * j], (int)owner[2 * j + 1]}, j});
      }
    }
    std::vector<int> asked(comm->nprocs, 0), asking(comm->nprocs, 0), indices;
    others.clear();
    std::map<std::pair<int, int>, int64_t> rows;
    for (auto &entry : wanted) {
      rows[entry.first] = others.size();
      others.push_back(entry.second);
      indices.push_back(entry.first.second);
      asked[entry.first.first]++;
    }
    place.assign(nall, 0);
    for (int j = 0; j < nall; j++) {
      if ((int)owner[2 * j] == comm->me) place[j] = (int64_t)owner[2 * j + 1];
      else if (seen[j]) place[j] = -1 - rows[{(int)owner[2 * j], (int)owner[2 * j + 1]}];
    }
    MPI_Alltoall(asked.data(), 1, MPI_INT, asking.data(), 1, MPI_INT, world);
    Exchange &e = exchanged;
    e.world = world;
    e.others = others.size();
    e.from.clear(), e.from_rows.clear(), e.to.clear(), e.to_rows.clear();
    for (int p = 0; p < comm->nprocs; p++) {
      if (asked[p]) e.from.push_back(p), e.from_rows.push_back(asked[p]);
      if (asking[p]) e.to.push_back(p), e.to_rows.push_back(asking[p]);
    }
    Tensor there = at::empty({(int64_t)indices.size(), 1}, at::kInt), mine = at::empty({std::accumulate(e.to_rows.begin(), e.to_rows.end(), (int64_t)0), 1}, at::kInt);
    std::copy(indices.begin(), indices.end(), there.data_ptr<int>());
    e.move(there, e.from, e.from_rows, mine, e.to, e.to_rows);
    e.device = package->device;
    e.sent = e.device.here(mine.select(1, 0).to(at::kLong));
  }

  void clear() {
    centre.clear(), neighbour.clear(), sender.clear(), receiver.clear(), vectors.clear();
  }

  // Edges within the cutoff that end at atom i, whose row is `row`; calls found(j) for the row of each sender.
  template <class Found> void edges_of(int i, int64_t row, Found found) {
    double **x = atom->x;
    const double most = package->cutoff * package->cutoff;
    for (int a = 0; a < list->numneigh[i]; a++) {
      const int j = list->firstneigh[i][a] & NEIGHMASK;
      const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
      if (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] >= most) continue;
      centre.push_back(i);
      neighbour.push_back(j);
      receiver.push_back(row);
      sender.push_back(found(j));
      vectors.insert(vectors.end(), d, d + 3);
    }
  }

  // Edges that end at own atoms.
  void gather() {
    clear();
    for (int i = 0; i < atom->nlocal; i++) edges_of(i, i, [this](int j) { return place[j]; });
  }

  // Edges that end at own atoms and at all ghosts fewer than `hops` edges from them.
  void surround() {
    clear();
    const int nlocal = atom->nlocal, nall = nlocal + atom->nghost;
    place.assign(nall, -1);
    atoms.resize(nlocal);
    for (int i = 0; i < nlocal; i++) place[i] = atoms[i] = i;
    size_t first = 0;
    for (int hop = 0; hop < package->hops; hop++) {
      const size_t last = atoms.size();
      for (size_t row = first; row < last; row++)
        edges_of(atoms[row], row, [this](int j) {
          if (place[j] < 0) place[j] = atoms.size(), atoms.push_back(j);
          return place[j];
        });
      first = last;
    }
  }

  // Energies of the rows and gradients along the edges.
  std::vector<Tensor> evaluate() {
    const int64_t m = sender.size(), rows = halo ? atoms.size() : atom->nlocal, beyond = halo ? 0 : others.size();
    const int64_t spare = rows < 2 || m < 2 ? 2 : 0;  // a pair of atoms without weight, where there is too little for a program
    const int64_t own = rows + spare, n = own + beyond, edges = m + spare;
    Tensor z = at::empty({n}, at::kLong), e = at::empty({2, edges}, at::kLong), v = at::empty({edges, 3}, at::kDouble), w = at::zeros({own}, at::kDouble);
    int64_t *number = z.data_ptr<int64_t>(), *index = e.data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; r++) number[r] = numbers[atom->type[halo ? atoms[r] : r]];
    for (int64_t r = rows; r < own; r++) number[r] = numbers[1];
    for (int64_t r = 0; r < beyond; r++) number[own + r] = numbers[atom->type[others[r]]];
    for (int64_t k = 0; k < m; k++) index[k] = sender[k] >= 0 ? sender[k] : own - 1 - sender[k];
    std::copy(receiver.begin(), receiver.end(), index + edges);
    std::copy(vectors.begin(), vectors.end(), v.data_ptr<double>());
    w.narrow(0, 0, atom->nlocal).fill_(1);
    for (int64_t k = 0; k < spare; k++) {
      index[m + k] = rows + 1 - k;
      index[edges + m + k] = rows + k;
      double *d = v.data_ptr<double>() + 3 * (m + k);
      d[0] = (k ? -0.9 : 0.9) * package->cutoff, d[1] = d[2] = 0;
    }
    return package->run(z, e, v, w, halo ? nullptr : &exchanged);
  }

  // Forces and virial: every edge pulls at its two atoms.
  void spread(const double *slopes) {
    double **f = atom->f;
    for (size_t k = 0; k < centre.size(); k++) {
      const int i = centre[k], j = neighbour[k];
      const double *g = slopes + 3 * k, *d = vectors.data() + 3 * k;
      for (int c = 0; c < 3; c++) f[i][c] += g[c], f[j][c] -= g[c];
      if (!vflag_either) continue;
      const double v[6] = {-d[0] * g[0], -d[1] * g[1], -d[2] * g[2], -0.5 * (d[0] * g[1] + d[1] * g[0]), -0.5 * (d[0] * g[2] + d[2] * g[0]), -0.5 * (d[1] * g[2] + d[2] * g[1])};
      for (int c = 0; c < 6; c++) {
        if (vflag_global) virial[c] += v[c];
        if (vflag_atom) vatom[i][c] += 0.5 * v[c], vatom[j][c] += 0.5 * v[c];
      }
    }
  }
};

}  // namespace LAMMPS_NS

// --- the plugin -------------------------------------------------------------------------------------------------------

// as in LAMMPS' src/PLUGIN/lammpsplugin.h, which its wheel does not ship
struct Plugin {
  const char *version, *style, *name, *info, *author;
  void *(*create)(void *);
  void *handle;
};

extern "C" void lammpsplugin_init(void *lammps, void *handle, void *registration) {
  auto *lmp = (LAMMPS_NS::LAMMPS *)lammps;
  if (string(lmp->version) != BUILT_FOR_VERSION || string(LAMMPS_NS::LAMMPS::git_descriptor()) != BUILT_FOR_SOURCE)
    lmp->error->all(FLERR, "the gossamer plugin was built for LAMMPS " BUILT_FOR_VERSION " (" BUILT_FOR_SOURCE "), this is {} ({}): gossamer lammps build", lmp->version,
                    LAMMPS_NS::LAMMPS::git_descriptor());
  mallopt(M_MMAP_THRESHOLD, 1 << 30);  // freed tensors stay in the process (gossamer/engine/memory.py)
  mallopt(M_TRIM_THRESHOLD, (1U << 31) - 1);
  try {
    register_operators();
  } catch (const std::exception &) {
    lmp->error->all(FLERR, "the gossamer plugin cannot be loaded into a process that has imported gossamer: run LAMMPS in a process of its own");
  }
  static Plugin plugin;
  plugin = {BUILT_FOR_VERSION, "pair", "gossamer", "potentials of gossamer", "gossamer", nullptr, handle};
  plugin.create = [](void *l) -> void * { return new LAMMPS_NS::PairGossamer((LAMMPS_NS::LAMMPS *)l); };
  ((void (*)(Plugin *, void *))registration)(&plugin, lammps);
}
