// Loops over tiles; included after the generated functions and PARTS.

struct Share {                // where the numbers of a part lie
  int64_t channels, first;    // first: of its radial functions on an edge
  const int64_t *in, *out;    // rows of its features and of its results
  int64_t chunks() const { return (channels + LANES - 1) / LANES; }
};

// layout: for each part its channels, and where its rows of the features and of the results begin
static std::vector<Share> shares(const int64_t *layout) {
  std::vector<Share> found;
  int64_t first = 0;
  for (const Part &part : PARTS) {
    found.push_back({layout[0], first, layout + 1, layout + 1 + part.dim});
    first += part.products * layout[0];
    layout += 1 + part.dim + part.rows;
  }
  return found;
}

// edges of a tile, at most: what they read shall stay in the second-level cache
static int64_t most_edges(int64_t size) {
#ifdef EDGE_WEIGHTS
  return std::max<int64_t>(16, 32768 / size);
#else
  return 512;
#endif
}

// first atom of each tile, and the number of atoms
static std::vector<int64_t> tiles(int64_t atoms, const int64_t *starts, int64_t most, int64_t threads) {
  std::vector<int64_t> found(1, 0);
  if (threads > 1) most = std::min(most, starts[atoms] / (4 * threads) + 1);
  for (int64_t i = 1; i < atoms; i++)
    if (starts[i + 1] - starts[found.back()] > most) found.push_back(i);
  found.push_back(atoms);
  return found;
}

// work(first edge, how many) for the edges of some atoms, at most so many at once
template <class Work> static void each_tile(const int64_t *starts, int64_t begin, int64_t end, int64_t most, Work work) {
  for (int64_t before = starts[begin]; before < starts[end]; before += most) work(before, std::min(most, starts[end] - before));
}

// work(atom, first, last) for the atoms whose edges are in a tile
template <class Work> static void each_atom(const int64_t *starts, int64_t begin, int64_t end, int64_t before, int64_t n, Work work) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = std::max(starts[i] - before, (int64_t)0), last = std::min(starts[i + 1] - before, n);
    if (first < last) work(i, first, last);
  }
}

// Features (or, backward, gradients of results) of every atom by parts and chunks of channels, (atoms, rows, LANES) each. All threads take part.
template <bool BACKWARD> static void collect(const std::vector<Share> &all, int64_t atoms, const T *x, int64_t width, T *to) {
  for (size_t p = 0; p < all.size(); p++) {
    const int64_t rows = BACKWARD ? PARTS[p].rows : PARTS[p].dim, *places = BACKWARD ? all[p].out : all[p].in;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < atoms; i++)
      for (int64_t u = 0; u < all[p].channels; u += LANES)
        for (int64_t k = 0; k < rows; k++)
          store<LANES>(to + ((u / LANES * atoms + i) * rows + k) * LANES, get(x + i * width + places[k] + u, std::min<int64_t>(LANES, all[p].channels - u)));
    to += all[p].chunks() * atoms * rows * LANES;
  }
}
template <bool BACKWARD> static int64_t collected(const std::vector<Share> &all, int64_t atoms) {
  int64_t size = 0;
  for (size_t p = 0; p < all.size(); p++) size += all[p].chunks() * atoms * (BACKWARD ? PARTS[p].rows : PARTS[p].dim) * LANES;
  return size;
}

// work(part, share, place, first channel) for every part and chunk of channels
template <bool BACKWARD, class Work> static void each_place(const std::vector<Share> &all, int64_t atoms, const T *other, int64_t rows, const T *radial, T *to_radial, Work work) {
  for (size_t p = 0; p < all.size(); p++)
    for (int64_t u = 0; u < all[p].channels; u += LANES) {
      const int64_t channels = std::min<int64_t>(LANES, all[p].channels - u);
#ifdef EDGE_WEIGHTS
      work(PARTS[p], all[p], Place{other, radial + all[p].first + u, to_radial + all[p].first + u, all[p].channels, channels}, u);
#else
      work(PARTS[p], all[p], Place{other, radial, nullptr, rows * 6 * LANES, channels}, u);
      radial += PARTS[p].products * rows * 6 * LANES;
#endif
      other += atoms * (BACKWARD ? PARTS[p].rows : PARTS[p].dim) * LANES;
    }
}

// the edges of a tile, whose numbers it has
static void prepare(Tile &tile, const int64_t *other, const T *harmonics, const T *values, int64_t size, const int64_t *first_row) {
  const int64_t n = tile.edge.size();
  tile.other.resize(n + 1); tile.row.resize(n + 1); tile.t.resize(n);
  tile.m.resize((n + LANES) * ENTRIES);
  for (int64_t first = 0; first < n; first += LANES) {
    T y[HARMONICS * LANES] = {};
    for (int64_t e = first; e < std::min(n, first + LANES); e++) {
      const int64_t edge = tile.edge[e];
      tile.other[e] = other[edge];
      for (int s = 0; s < HARMONICS; s++) y[s * LANES + e - first] = harmonics[edge * HARMONICS + s];
#ifdef EDGE_WEIGHTS
      tile.row[e] = edge * size;
#else
      const T x = values[edge], scaled = (x > 0 ? (x < 1 ? x : T(1)) : T(0)) * size;  // NaN becomes 0: harmonics carry it on
      const int64_t knot = std::min((int64_t)scaled, size - 1);
      tile.t.data[e] = scaled - knot;
      tile.row[e] = (knot + (first_row ? first_row[edge] : 0)) * 6 * LANES;
#endif
    }
    matrices(y, tile.m.data + first * ENTRIES);
  }
}

// values: distance over cutoff of every edge, and size intervals of a table of so many rows; first_row: where the intervals of each edge begin in
// it, null: at its first row; or, with EDGE_WEIGHTS, size radial functions of every edge, and no table
// atoms: those that collect (forward, receivers; backward, senders); others: rows of what is collected, features or gradient
extern "C" {

void forward(int64_t atoms, int64_t others, int64_t width_in, int64_t width_out, int64_t size, int64_t rows, int64_t threads, const int64_t *layout,
             const T *features, const T *harmonics, const T *values, const int64_t *first_row, const T *table, const int64_t *sender, const int64_t *receiver_starts, T *out) {
  const std::vector<Share> all = shares(layout);
  const std::vector<int64_t> first_atom = tiles(atoms, receiver_starts, most_edges(size), threads);
  Buffer collection;
  collection.resize(collected<false>(all, others));
#pragma omp parallel num_threads(threads) if (threads > 1 && receiver_starts[atoms] * width_in > SMALL)
  {
    collect<false>(all, others, features, width_in, collection.data);
    static thread_local Tile tile;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < (int64_t)first_atom.size() - 1; number++) {
      const int64_t begin = first_atom[number], end = first_atom[number + 1];
      std::fill(out + begin * width_out, out + end * width_out, T(0));
      each_tile(receiver_starts, begin, end, most_edges(size), [&](int64_t before, int64_t n) {
        tile.edge.resize(n);
        std::iota(tile.edge.begin(), tile.edge.end(), before);
        prepare(tile, sender, harmonics, values, size, first_row);
        each_place<false>(all, others, collection.data, rows, table ? table : values, nullptr, [&](const Part &part, const Share &share, const Place &place, int64_t u) {
          each_atom(receiver_starts, begin, end, before, n, [&](int64_t i, int64_t first, int64_t last) {
            V results[MOST_ROWS];
            (place.channels == LANES ? part.forward : part.forward_some)(tile, first, last, place, results);
            for (int k = 0; k < part.rows; k++) add_some(out + i * width_out + share.out[k] + u, results[k], place.channels);
          });
        });
      });
    }
  }
}

void backward(int64_t atoms, int64_t others, int64_t width_in, int64_t width_out, int64_t size, int64_t rows, int64_t threads, const int64_t *layout,
              const T *features, const T *harmonics, const T *values, const int64_t *first_row, const T *table, const int64_t *receiver, const int64_t *sender_starts,
              const int64_t *by_sender, const T *gradient, T *to_features, T *to_harmonics, T *to_values) {
  const std::vector<Share> all = shares(layout);
  const std::vector<int64_t> first_atom = tiles(atoms, sender_starts, most_edges(size), threads);
  Buffer collection;
  collection.resize(collected<true>(all, others));
#pragma omp parallel num_threads(threads) if (threads > 1 && sender_starts[atoms] * width_in > SMALL)
  {
    collect<true>(all, others, gradient, width_out, collection.data);
    static thread_local Tile tile;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < (int64_t)first_atom.size() - 1; number++) {
      const int64_t begin = first_atom[number], end = first_atom[number + 1];
      std::fill(to_features + begin * width_in, to_features + end * width_in, T(0));
      each_tile(sender_starts, begin, end, most_edges(size), [&](int64_t before, int64_t n) {
        tile.edge.assign(by_sender + before, by_sender + before + n);
        prepare(tile, receiver, harmonics, values, size, first_row);
        tile.sums.resize(n * ROOM);
        std::fill(tile.sums.data, tile.sums.data + n * ROOM, T(0));
        each_place<true>(all, others, collection.data, rows, table ? table : values, to_values, [&](const Part &part, const Share &share, const Place &place, int64_t u) {
          each_atom(sender_starts, begin, end, before, n, [&](int64_t j, int64_t first, int64_t last) {
            V f[MOST_DIM], d[MOST_DIM];
            for (int k = 0; k < part.dim; k++) f[k] = get(features + j * width_in + share.in[k] + u, place.channels);
            (place.channels == LANES ? part.backward : part.backward_some)(tile, first, last, place, f, d);
            for (int k = 0; k < part.dim; k++) add_some(to_features + j * width_in + share.in[k] + u, d[k], place.channels);
          });
        });
        for (int64_t e = 0; e < n; e++) {
          const int64_t edge = tile.edge[e];
          for (int s = 0; s <= HARMONICS; s++) {
            const T *each = tile.sums.data + e * ROOM + s * WIDTH, sum = std::accumulate(each, each + WIDTH, T(0));
            if (s < HARMONICS) to_harmonics[edge * HARMONICS + s] = sum;
#ifndef EDGE_WEIGHTS
            else to_values[edge] = values[edge] < 0 || values[edge] > 1 ? 0 : sum * size;
#endif
          }
        }
      });
    }
  }
}
}
