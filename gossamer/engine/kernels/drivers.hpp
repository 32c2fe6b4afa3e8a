// Loops over atoms; included after the generated functions.

#ifdef EDGE_WEIGHTS
static void prepare(Job &job, int e, int64_t edge, const T *values, int64_t width, const int64_t *, T *gradient, bool) {
  job.w[e] = values + edge * width;
  job.dw[e] = gradient + edge * width;
}
#else
// weights of the quintic Hermite spline (gossamer/engine/kernels/table.py) and, if asked, their derivatives with respect to x
static void interval(Job &job, int e, T x, int64_t intervals, int64_t first, bool slopes) {
  T scaled = (x > 0 ? (x < 1 ? x : T(1)) : T(0)) * intervals;  // NaN becomes 0: harmonics carry it on
  int64_t k = std::min((int64_t)scaled, intervals - 1);
  T t = scaled - k, t2 = t * t, t3 = t2 * t;
  job.knot[e] = (first + k) * 3 * CHUNK;
  T late = t3 * (10 - 15 * t + 6 * t2);
  job.h[0][e] = 1 - late;
  job.h[1][e] = t - t3 * (6 - 8 * t + 3 * t2);
  job.h[2][e] = T(0.5) * t2 - t3 * (T(1.5) - T(1.5) * t + T(0.5) * t2);
  job.h[3][e] = late;
  job.h[4][e] = t3 * (-4 + 7 * t - 3 * t2);
  job.h[5][e] = t3 * (T(0.5) - t + T(0.5) * t2);
  if (!slopes) return;
  T s = (x < 0 || x > 1) ? 0 : intervals, l = 30 * t2 * (1 - t) * (1 - t);
  job.d[0][e] = -s * l;
  job.d[1][e] = s * (1 - t2 * (18 - 32 * t + 15 * t2));
  job.d[2][e] = s * (t - t2 * (T(4.5) - 6 * t + T(2.5) * t2));
  job.d[3][e] = s * l;
  job.d[4][e] = s * t2 * (-12 + 28 * t - 15 * t2);
  job.d[5][e] = s * t2 * (T(1.5) - 4 * t + T(2.5) * t2);
}

static void prepare(Job &job, int e, int64_t edge, const T *x, int64_t intervals, const int64_t *first_row, T *, bool slopes) {
  interval(job, e, x[edge], intervals, first_row ? first_row[edge] : 0, slopes);
}
#endif

// values: distance over cutoff of every edge, and size intervals of a table of so many rows; first_row: where the intervals of each edge begin in
// it, null: at its first row; or, with EDGE_WEIGHTS, size radial functions of every edge, and no table
extern "C" {

void forward(int64_t atoms, int64_t width_in, int64_t width_out, int64_t size, int64_t rows, int64_t threads, const int64_t *layout,
             const T *features, const T *harmonics, const T *values, const int64_t *first_row, const T *table, const int64_t *sender, const int64_t *receiver_starts, T *out) {
#pragma omp parallel num_threads(threads) if (threads > 1 && receiver_starts[atoms] * width_in > SMALL)
  {
    static thread_local std::unique_ptr<Job> owner;  // too large for the stack of a thread at high l
    if (!owner) owner.reset(new Job);
    Job &job = *owner;
    job.table = table;
    job.chunk = rows * 3 * CHUNK;
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < atoms; i++) {
      job.out = out + i * width_out;
      std::fill(job.out, job.out + width_out, T(0));
      for (int64_t first = receiver_starts[i]; first < receiver_starts[i + 1]; first += STRIDE) {
        job.n = (int)std::min<int64_t>(STRIDE, receiver_starts[i + 1] - first);
        for (int e = 0; e < job.n; e++) {
          prepare(job, e, first + e, values, size, first_row, nullptr, false);
          job.f[e] = features + sender[first + e] * width_in;
          for (int s = 0; s < HARMONICS; s++) job.y[s][e] = harmonics[(first + e) * HARMONICS + s];
        }
        matrices(job.n, job.y, job.m);
        forward_all(job, layout);
      }
    }
  }
}

void backward(int64_t atoms, int64_t width_in, int64_t width_out, int64_t size, int64_t rows, int64_t threads, const int64_t *layout,
              const T *features, const T *harmonics, const T *values, const int64_t *first_row, const T *table, const int64_t *receiver, const int64_t *sender_starts,
              const int64_t *by_sender, const T *gradient, T *to_features, T *to_harmonics, T *to_values) {
#pragma omp parallel num_threads(threads) if (threads > 1 && sender_starts[atoms] * width_in > SMALL)
  {
    static thread_local std::unique_ptr<Job> owner;  // too large for the stack of a thread at high l
    if (!owner) owner.reset(new Job);
    Job &job = *owner;
    job.table = table;
    job.chunk = rows * 3 * CHUNK;
    std::vector<T> sums(STRIDE * (HARMONICS + 1) * LANES), own(width_in);
    job.sums = sums.data();
    job.out = own.data();
#pragma omp for schedule(dynamic, 4)
    for (int64_t j = 0; j < atoms; j++) {
      T *total = to_features + j * width_in;
      std::fill(total, total + width_in, T(0));
      job.f[0] = features + j * width_in;
      for (int64_t first = sender_starts[j]; first < sender_starts[j + 1]; first += STRIDE) {
        job.n = (int)std::min<int64_t>(STRIDE, sender_starts[j + 1] - first);
        for (int e = 0; e < job.n; e++) {
          int64_t edge = by_sender[first + e];
          prepare(job, e, edge, values, size, first_row, to_values, true);
          job.g[e] = gradient + receiver[edge] * width_out;
          for (int s = 0; s < HARMONICS; s++) job.y[s][e] = harmonics[edge * HARMONICS + s];
        }
        matrices(job.n, job.y, job.m);
        std::fill(sums.begin(), sums.begin() + job.n * (HARMONICS + 1) * LANES, T(0));
        std::fill(own.begin(), own.end(), T(0));
        backward_all(job, layout);
        for (int64_t k = 0; k < width_in; k++) total[k] += own[k];
        for (int e = 0; e < job.n; e++) {
          const T *row = job.sums + e * (HARMONICS + 1) * LANES;
          int64_t edge = by_sender[first + e];
          for (int s = 0; s <= HARMONICS; s++) {
            T sum = 0;
            for (int l = 0; l < LANES; l++) sum += row[s * LANES + l];
            if (s < HARMONICS) to_harmonics[edge * HARMONICS + s] = sum;
#ifndef EDGE_WEIGHTS
            else to_values[edge] = sum;
#endif
          }
        }
      }
    }
  }
}
}
