// Vectors along channels; included after T.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <memory>
#include <new>
#include <vector>
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#define LANES (64 / (int)sizeof(T))
#elif defined(__AVX__)
#define LANES (32 / (int)sizeof(T))
#else
#define LANES (16 / (int)sizeof(T))
#endif

#define SMALL (1 << 17)  // edges times channels below which waking other threads costs more than they save

template <int N> struct Vector { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <> struct Vector<1> { typedef T type; };
template <int N> using vec = typename Vector<N>::type;
template <int N> static inline vec<N> load(const T *p) { vec<N> v; std::memcpy(&v, p, sizeof v); return v; }
template <int N> static inline void store(T *p, vec<N> v) { std::memcpy(p, &v, sizeof v); }
template <int N> static inline void add(T *p, vec<N> v) { store<N>(p, load<N>(p) + v); }

struct Buffer {  // numbers from the beginning of a line of the cache on
  T *data = nullptr;
  int64_t size = 0;
  void resize(int64_t n) {  // what was there is lost
    if (n <= size) return;
    std::free(data);
    data = (T *)std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64);
    if (!data) throw std::bad_alloc();
    size = n;
  }
  ~Buffer() { std::free(data); }
};


extern "C" {
void vector_bytes(int64_t *bytes) { *bytes = LANES * sizeof(T); }

// receiver_starts: first edge of each receiver (edges are sorted by it); by_sender: edges sorted by sender; sender_starts: first of each sender there
void sort_edges(int64_t atoms, int64_t edges, const int64_t *index, int64_t *receiver_starts, int64_t *sender_starts, int64_t *by_sender) {
  const int64_t *sender = index, *receiver = index + edges;
  std::fill(receiver_starts, receiver_starts + atoms + 1, 0);
  std::fill(sender_starts, sender_starts + atoms + 1, 0);
  for (int64_t e = 0; e < edges; e++) { receiver_starts[receiver[e] + 1]++; sender_starts[sender[e] + 1]++; }
  for (int64_t i = 0; i < atoms; i++) { receiver_starts[i + 1] += receiver_starts[i]; sender_starts[i + 1] += sender_starts[i]; }
  std::vector<int64_t> next(sender_starts, sender_starts + atoms);
  for (int64_t e = 0; e < edges; e++) by_sender[next[sender[e]]++] = e;
}
}
