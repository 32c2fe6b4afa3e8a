// Polynomials in the features of a node, LANES channels at once. Included in generated source, after T, N_IN, N_OUT, TOTAL and vectors.hpp.
#define BLOCK 64  // nodes that one thread goes through at once

typedef vec<LANES> V;

struct Dual {  // a value and its derivative in one direction
  V v, d;
};
static inline Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.v * b.d + a.d * b.v}; }
static inline Dual operator*(Dual a, V b) { return {a.v * b, a.d * b}; }
static inline Dual &operator+=(Dual &a, Dual b) { a.v += b.v; a.d += b.d; return a; }

// a constant as a number, and what of a number is asked for
template <class N> static inline N constant(V v);
template <> inline V constant<V>(V v) { return v; }
template <> inline Dual constant<Dual>(V v) { return {v, V{}}; }
static inline V part(V a) { return a; }
static inline V part(Dual a) { return a.d; }

// The way through the trees: t collects the value of a node, g is the gradient times the factors so far. Y, X, K: what is wanted.
#define BEGIN(o) { N t0 = constant<N>(V{}), g0 = constant<N>(g[o]);
#define OPEN(D, U, l, own) { N t##D = constant<N>(own), g##D = g##U * x[l];
#define MONOMIAL(D, m) if constexpr (K) dk[m] += part(g##D);
#define LEAF(D, l, m) t##D += x[l] * k[m]; if constexpr (X) d[l] += part(g##D * k[m]); if constexpr (K) dk[m] += part(g##D * x[l]);
#define SHUT(D, U, l) t##U += t##D * x[l]; if constexpr (X) d[l] += part(g##U * t##D); }
#define END(o) if constexpr (Y) y[o] += part(t0); }

// all trees; generated
template <class N, bool Y, bool X, bool K> static void all(const N *x, const V *k, const V *g, V *y, V *d, V *dk);

// up to LANES channels, zeros beyond
static inline V some(const T *p, int64_t channels) {
  if (channels == LANES) return load<LANES>(p);
  V v = {};
  std::memcpy(&v, p, channels * sizeof(T));
  return v;
}

struct Job {  // one chunk of the channels of nodes of one element
  V x[N_IN], h[N_IN], k[TOTAL], g[N_OUT], y[N_OUT], d[N_IN], dk[TOTAL];
  Dual z[N_IN];
};

struct Task { int64_t element, chunk, first, last; };

// out: y (nodes, N_OUT, C), d (nodes, N_IN, C), dk (elements, TOTAL, C). They are, as far as wanted, the value, the gradients of
// sum(g y) in x and k; or the derivatives of these in the direction h of x.
template <class N, bool Y, bool X, bool K>
static void run(int64_t nodes, int64_t elements, int64_t C, int64_t threads, const int64_t *species, const T *x, const T *k, const T *g, const T *h,
                T *y, T *d, T *dk) {
  constexpr bool dual = std::is_same<N, Dual>::value;
  std::vector<int64_t> starts(elements + 1), order(nodes);
  for (int64_t i = 0; i < nodes; i++) starts[species[i] + 1]++;
  for (int64_t e = 0; e < elements; e++) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts.begin(), starts.end());
  for (int64_t i = 0; i < nodes; i++) order[next[species[i]]++] = i;
  if (K) std::fill(dk, dk + elements * TOTAL * C, T(0));
  std::vector<Task> tasks;
  for (int64_t u = 0; u < C; u += LANES)
    for (int64_t e = 0; e < elements; e++)
      for (int64_t i = starts[e], step = K ? nodes : BLOCK; i < starts[e + 1]; i += step) tasks.push_back({e, u, i, std::min(i + step, starts[e + 1])});
#pragma omp parallel num_threads(threads) if (threads > 1 && nodes * C * TOTAL > 16 * SMALL)
  {
    static thread_local std::unique_ptr<Job> owner;  // too large for the stack of a thread
    if (!owner) owner.reset(new Job);
    Job &job = *owner;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < (int64_t)tasks.size(); number++) {
      const Task task = tasks[number];
      const int64_t u = task.chunk, c = std::min<int64_t>(LANES, C - u);
      for (int64_t m = 0; m < TOTAL; m++) job.k[m] = some(k + (task.element * TOTAL + m) * C + u, c);
      if (K) std::fill(job.dk, job.dk + TOTAL, V{});
      for (int64_t place = task.first; place < task.last; place++) {
        const int64_t i = order[place];
        for (int64_t l = 0; l < N_IN; l++) {
          job.x[l] = some(x + (i * N_IN + l) * C + u, c);
          if (dual) job.z[l] = {job.x[l], some(h + (i * N_IN + l) * C + u, c)};
          job.d[l] = V{};
        }
        for (int64_t o = 0; o < N_OUT; o++) {
          if (X || K) job.g[o] = some(g + (i * N_OUT + o) * C + u, c);
          job.y[o] = V{};
        }
        const void *point = dual ? (const void *)job.z : (const void *)job.x;
        all<N, Y, X, K>((const N *)point, job.k, job.g, job.y, job.d, job.dk);
        for (int64_t o = 0; Y && o < N_OUT; o++) std::memcpy(y + (i * N_OUT + o) * C + u, &job.y[o], c * sizeof(T));
        for (int64_t l = 0; X && l < N_IN; l++) std::memcpy(d + (i * N_IN + l) * C + u, &job.d[l], c * sizeof(T));
      }
      for (int64_t m = 0; K && m < TOTAL; m++) std::memcpy(dk + (task.element * TOTAL + m) * C + u, &job.dk[m], c * sizeof(T));
    }
  }
}

extern "C" {
void value(int64_t nodes, int64_t elements, int64_t C, int64_t threads, const int64_t *species, const T *x, const T *k, T *y) {
  run<V, true, false, false>(nodes, elements, C, threads, species, x, k, nullptr, nullptr, y, nullptr, nullptr);
}
void to_x(int64_t nodes, int64_t elements, int64_t C, int64_t threads, const int64_t *species, const T *x, const T *k, const T *g, T *d) {
  run<V, false, true, false>(nodes, elements, C, threads, species, x, k, g, nullptr, nullptr, d, nullptr);
}
#ifdef TRAINING
void to_coefficients(int64_t nodes, int64_t elements, int64_t C, int64_t threads, const int64_t *species, const T *x, const T *k, const T *g, T *dk) {
  run<V, false, false, true>(nodes, elements, C, threads, species, x, k, g, nullptr, nullptr, nullptr, dk);
}
void second(int64_t nodes, int64_t elements, int64_t C, int64_t threads, const int64_t *species, const T *x, const T *k, const T *g, const T *h,
            T *y, T *d, T *dk) {
  run<Dual, true, true, true>(nodes, elements, C, threads, species, x, k, g, h, y, d, dk);
}
#endif
}
