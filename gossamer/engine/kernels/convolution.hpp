// What the generated functions of a convolution work with. Included in generated source, after T, HARMONICS, ENTRIES and vectors.hpp.
//
// Each atom goes through its edges, and from each reads features (backward: gradients) of the atom at the other end and radial functions.
// LANES channels of a part of the products are gone through for a tile of atoms before the next: what is read again and again, rows
// of features and of the table, then stays in the second-level cache, and what the next edge needs is fetched ahead.

typedef vec<LANES> V;

struct Tile {                        // the edges of some atoms, one atom after the other
  std::vector<int64_t> edge, other;  // its number, and the atom at the other end
  std::vector<int64_t> row;          // where its radial functions begin
  Buffer t, m, sums;                 // place in its interval of the table; entries of its matrices, (edges / LANES, ENTRIES, LANES); ROOM sums
};

struct Place {                       // LANES channels of a part
  const T *other, *radial;           // (atoms, rows, LANES) features or gradients; radial functions of the first product
  T *to_radial;
  int64_t step, channels;            // from the radial functions of one product to the next; channels: LANES, or in the last place fewer
};

// Products of one block of the features. forward, backward: for the edges from first to last, which are of one atom; out: its sums; f, d: its
// features and their gradient. forward_some, backward_some: for fewer than LANES channels.
struct Part {
  int dim, rows, products;           // components of the block; of all results
  void (*forward)(const Tile &, int64_t first, int64_t last, const Place &, V *out), (*forward_some)(const Tile &, int64_t, int64_t, const Place &, V *);
  void (*backward)(const Tile &, int64_t first, int64_t last, const Place &, const V *f, V *d), (*backward_some)(const Tile &, int64_t, int64_t, const Place &, const V *, V *);
};

// n numbers, at most LANES; zeros beyond
static inline V get(const T *p, int64_t n) {
  if (n == LANES) return load<LANES>(p);
  V v = {};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}
static inline void put(T *p, V v, int64_t n) {
  if (n == LANES) store<LANES>(p, v);
  else std::memcpy(p, &v, n * sizeof(T));
}
static inline void add_some(T *p, V v, int64_t n) { put(p, get(p, n) + v, n); }

// --- the edges of an atom, each with the rows at its other end, and with the radial functions of a product -----------------------------------------

#define FETCH(p, n) if (AHEAD && (n) * sizeof(V) % 64 == 0) __builtin_prefetch((p) + (n) * LANES)
#define EDGES(rows, ahead)                                                                                                                     \
  for (int64_t e = first; e < last; e++) {                                                                                                     \
    constexpr bool AHEAD = ALWAYS || ahead;                                                                                                    \
    const T *other = place.other + tile.other[e] * ((rows) * LANES), *next_other = place.other + tile.other[e + 1] * ((rows) * LANES);         \
    const T *radial = place.radial + tile.row[e], *next_radial = place.radial + tile.row[e + 1];                                               \
    const T *m = tile.m.data + (e & -LANES) * ENTRIES + (e & (LANES - 1)), t = tile.t.data[e];                                                 \
    (void)next_other, (void)next_radial, (void)t;
#define OTHER(v, n) const V v = load<LANES>(other + (n) * LANES); FETCH(next_other, n);

#ifdef EDGE_WEIGHTS  // numbers of every edge
#define WHOLE_ONLY false
#define ALWAYS true
#define RADIAL(r, p) const V r = get(radial + (p) * place.step, WHOLE ? LANES : place.channels); FETCH(next_radial + (p) * place.step, 0);
#define RADIAL_AND_SLOPE(r, q, p) RADIAL(r, p)
#define GRADIENT(w, q, p) put(place.to_radial + tile.row[e] + (p) * place.step, w, WHOLE ? LANES : place.channels);
#else  // a table: for each interval the coefficients of a polynomial of degree 5, highest power first
#define WHOLE_ONLY true
#define ALWAYS false
#define COEFFICIENT(p, n) load<LANES>(radial + (p) * place.step + (n) * LANES); FETCH(next_radial + (p) * place.step, n)
#define HIGHER(r, p, n) r = r * t + COEFFICIENT(p, n);
#define RADIAL(r, p) V r = COEFFICIENT(p, 0); HIGHER(r, p, 1) HIGHER(r, p, 2) HIGHER(r, p, 3) HIGHER(r, p, 4) HIGHER(r, p, 5)
#define HIGHER_BOTH(r, q, p, n) q = q * t + r; HIGHER(r, p, n)
#define RADIAL_AND_SLOPE(r, q, p)                                                                                                              \
  V r = COEFFICIENT(p, 0); V q = r;                                                                                                            \
  HIGHER(r, p, 1) HIGHER_BOTH(r, q, p, 2) HIGHER_BOTH(r, q, p, 3) HIGHER_BOTH(r, q, p, 4) HIGHER_BOTH(r, q, p, 5)
#define GRADIENT(w, q, p) slope += q * w;
#endif

// --- sums over channels ------------------------------------------------------------------------------------------------------------------------

// of a and b by turns the even, or odd, ones of their blocks of S numbers
template <int S, bool ODD, size_t... L> static inline V halves(V a, V b, std::index_sequence<L...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (L / S % 2 * LANES + L / (2 * S) * 2 * S + ODD * S + L % S)...);
#else
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, I{(L / S % 2 * LANES + L / (2 * S) * 2 * S + ODD * S + L % S)...});
#endif
}
template <int S> static inline V half_sums(V a, V b) {
  return halves<S, false>(a, b, std::make_index_sequence<LANES>()) + halves<S, true>(a, b, std::make_index_sequence<LANES>());
}
// the total of each of LANES vectors
template <int S = 1> static inline V totals(const V *v) {
  if constexpr (S < LANES) return half_sums<S>(totals<2 * S>(v), totals<2 * S>(v + S));
  else return *v;
}
template <int S = LANES / 2> static inline T total(V v) {
  if constexpr (S > 0) return total<S / 2>(half_sums<S>(v, v));
  else return v[0];
}
template <int N> static inline void add_totals(const V *v, T *to) {
  if constexpr (N >= LANES) {
    add<LANES>(to, totals(v));
    add_totals<N - LANES>(v + LANES, to + LANES);
  } else if constexpr (N > 2) {
    V filled[LANES] = {};
    for (int n = 0; n < N; n++) filled[n] = v[n];
    add<LANES>(to, totals(filled));
  } else if constexpr (N > 0) {
    *to += total(*v);
    add_totals<N - 1>(v + 1, to + 1);
  }
}

// What an edge sums up: gradients of its harmonics, and of its place in the interval, WIDTH numbers of each.
#define ROOM (HARMONICS * WIDTH + LANES)
#define SUMS(low, n, ...) {                                                                                                                    \
    T *to = tile.sums.data + e * ROOM;                                                                                                         \
    const V v[] = {__VA_ARGS__};                                                                                                               \
    if constexpr (WIDTH == 1) { add_totals<n>(v, to + (low)); to[HARMONICS] += total(slope); }                                                 \
    else { for (int s = 0; s < n; s++) add<LANES>(to + (s + (low)) * LANES, v[s]); add<LANES>(to + HARMONICS * LANES, slope); }                \
  }
