// The work of one atom and some of its edges. Included in generated source, after T, HARMONICS, ENTRIES and vectors.hpp.
#define STRIDE 64  // neighbours that are gone through at once

struct Job {  // one atom and up to STRIDE of its edges
  int n;
  const T *f[STRIDE], *g[STRIDE];        // features of the sender; gradient at the receiver
  T y[HARMONICS][STRIDE], m[ENTRIES][STRIDE], h[6][STRIDE], d[6][STRIDE];
  int64_t knot[STRIDE], chunk;           // where its interval starts in a chunk of the table; size of a chunk
  const T *table;
  const T *w[STRIDE];                    // radial functions of each edge, where they are given
  T *dw[STRIDE], *out, *sums;
};

#ifdef EDGE_WEIGHTS
template <int N> static inline vec<N> radial(const Job &job, int64_t first, int64_t u, int e) { return load<N>(job.w[e] + first + u); }
template <int N> static inline void radial_and_slope(const Job &job, int64_t first, int64_t u, int e, vec<N> &r, vec<N> &) { r = load<N>(job.w[e] + first + u); }
#define GRADIENT(place) store<L_>(job.dw[e] + layout[place] + u, w);
#else
#define GRADIENT(place) slope += q * w;

template <int N> static inline vec<N> radial(const Job &job, int64_t first, int64_t u, int e) {
  const T *t = job.table + (first + u / CHUNK) * job.chunk + job.knot[e] + u % CHUNK;
  return job.h[0][e] * load<N>(t) + job.h[1][e] * load<N>(t + CHUNK) + job.h[2][e] * load<N>(t + 2 * CHUNK) +
         job.h[3][e] * load<N>(t + 3 * CHUNK) + job.h[4][e] * load<N>(t + 4 * CHUNK) + job.h[5][e] * load<N>(t + 5 * CHUNK);
}
template <int N> static inline void radial_and_slope(const Job &job, int64_t first, int64_t u, int e, vec<N> &r, vec<N> &q) {
  const T *t = job.table + (first + u / CHUNK) * job.chunk + job.knot[e] + u % CHUNK;
  vec<N> t0 = load<N>(t), t1 = load<N>(t + CHUNK), t2 = load<N>(t + 2 * CHUNK), t3 = load<N>(t + 3 * CHUNK),
         t4 = load<N>(t + 4 * CHUNK), t5 = load<N>(t + 5 * CHUNK);
  r = job.h[0][e] * t0 + job.h[1][e] * t1 + job.h[2][e] * t2 + job.h[3][e] * t3 + job.h[4][e] * t4 + job.h[5][e] * t5;
  q = job.d[0][e] * t0 + job.d[1][e] * t1 + job.d[2][e] * t2 + job.d[3][e] * t3 + job.d[4][e] * t4 + job.d[5][e] * t5;
}

#endif

// every channel: whole vectors, then smaller ones
#define SWEEP(function, channels)                                              \
  {                                                                            \
    int64_t u = 0, c = channels;                                               \
    for (; u + LANES <= c; u += LANES) function<LANES>(job, layout, u);        \
    if (LANES > 8 && c - u >= 8) { function<8>(job, layout, u); u += 8; }      \
    if (LANES > 4 && c - u >= 4) { function<4>(job, layout, u); u += 4; }      \
    if (LANES > 2 && c - u >= 2) { function<2>(job, layout, u); u += 2; }      \
    if (c - u >= 1) function<1>(job, layout, u);                               \
  }
