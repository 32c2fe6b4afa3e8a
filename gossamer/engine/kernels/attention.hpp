// Geodite's edges (gossamer/engine/kernels/attention.py): included after T, DEGREES and HARMONICS, with vectors.hpp.

struct Sizes {
  int64_t atoms, channels, parts, heads, threads;
};
static inline T sigmoid(T x) { return 1 / (1 + std::exp(-x)); }

// sums over a part of the channels, in eights
template <class F8, class F1> static inline T reduce(int64_t c, int64_t end, F8 eight, F1 one) {
  vec<8> sums = {};
  T total = 0;
  for (; c + 8 <= end; c += 8) sums += eight(c);
  for (; c < end; c++) total += one(c);
  for (int l = 0; l < 8; l++) total += sums[l];
  return total;
}
// attention of one edge before its SiLU, for each head
static void logits(const Sizes &n, const T *q, const T *k, const T *sl, T *sum) {
  const int64_t width = n.channels / n.heads;
  for (int64_t head = 0; head < n.heads; head++)
    sum[head] = reduce(
        head * width, (head + 1) * width, [=](int64_t c) { return load<8>(q + c) * load<8>(k + c) * load<8>(sl + c); },
        [=](int64_t c) { return q[c] * k[c] * sl[c]; });
}
// the heads tile all 3 C channels of a message
static void spread(const Sizes &n, const T *value, T *share) {
  const int64_t width = 3 * n.channels / n.heads;
  for (int64_t head = 0; head * width < n.parts * n.channels; head++)
    for (int64_t c = head * width; c < std::min((head + 1) * width, n.parts * n.channels); c++) share[c] = value[head];
}

template <int L_> static void collect(const Sizes &n, const T *f, const T *g, const T *v, const T *share, const T *x, const T *y, T *h, T *out, int64_t c) {
  typedef vec<L_> V;
  const int64_t C = n.channels;
  add<L_>(h + c, load<L_>(f + c) * load<L_>(g + c) + load<L_>(share + c) * load<L_>(v + c));
  V d = load<L_>(f + C + c) * load<L_>(g + C + c) + load<L_>(share + C + c) * load<L_>(v + C + c);
  if (n.parts == 2) {
    for (int s = 0; s < HARMONICS; s++) add<L_>(out + s * C + c, y[s] * d);
  } else {
    V r = load<L_>(f + 2 * C + c) * load<L_>(g + 2 * C + c) + load<L_>(share + 2 * C + c) * load<L_>(v + 2 * C + c);
    for (int s = 0; s < HARMONICS; s++) add<L_>(out + s * C + c, y[s] * d + r * load<L_>(x + s * C + c));
  }
}

// gradient of one message, and what follows from it; y_sums: vectors over lanes
template <int L_>
static void distribute(const Sizes &n, const T *f, const T *g, const T *v, const T *share, const T *x, const T *y, const T *dh, const T *dout, T *df,
                       T *dg, T *dv, T *dx, T *dshare, T *y_sums, int64_t c) {
  typedef vec<L_> V;
  const int64_t C = n.channels;
  V m[3] = {load<L_>(dh + c), V{}, V{}}, message[3];
  for (int64_t p = 0; p < n.parts; p++)
    message[p] = load<L_>(f + p * C + c) * load<L_>(g + p * C + c) + load<L_>(share + p * C + c) * load<L_>(v + p * C + c);
  for (int s = 0; s < HARMONICS; s++) {
    V d = load<L_>(dout + s * C + c);
    m[1] += y[s] * d;
    add<L_>(y_sums + s * LANES, d * message[1]);
    if (n.parts == 3) {
      m[2] += d * load<L_>(x + s * C + c);
      add<L_>(dx + s * C + c, d * message[2]);
    }
  }
  for (int64_t p = 0; p < n.parts; p++) {
    const int64_t k = p * C + c;
    store<L_>(df + k, m[p] * load<L_>(g + k));
    add<L_>(dg + k, m[p] * load<L_>(f + k));
    add<L_>(dv + k, m[p] * load<L_>(share + k));
    store<L_>(dshare + k, m[p] * load<L_>(v + k));
  }
}

// along a degree: component of Q and of P; the part of Q·P that is perpendicular to Y
template <int L_> static void align(const Sizes &n, const T *q, const T *p, const T *y, T *omega, int64_t c) {
  typedef vec<L_> V;
  V total = {};
  for (int l = 1, s = 0; l <= DEGREES; l++) {
    V a = {}, b = {};
    for (int m = 0; m < 2 * l + 1; m++, s++) {
      V x = load<L_>(q + s * n.channels + c), z = load<L_>(p + s * n.channels + c);
      total += x * z, a += y[s] * x, b += y[s] * z;
    }
    total -= a * b;
  }
  store<L_>(omega + c, total);
}
template <int L_> static void align_gradient(const Sizes &n, const T *q, const T *p, const T *y, const T *gradient, T *dq, T *y_sums, int64_t c) {
  typedef vec<L_> V;
  V d = load<L_>(gradient + c);
  for (int l = 1, s = 0; l <= DEGREES; l++) {
    V a = {}, b = {};
    for (int m = 0; m < 2 * l + 1; m++) {
      a += y[s + m] * load<L_>(q + (s + m) * n.channels + c);
      b += y[s + m] * load<L_>(p + (s + m) * n.channels + c);
    }
    for (int m = 0; m < 2 * l + 1; m++, s++) {
      V x = load<L_>(q + s * n.channels + c), z = load<L_>(p + s * n.channels + c);
      add<L_>(dq + s * n.channels + c, d * (z - b * y[s]));
      if (y_sums) add<L_>(y_sums + s * LANES, -d * (x * b + z * a));
    }
  }
}

#define CHANNELS(call)                                                          \
  {                                                                             \
    int64_t c = 0, C = n.channels;                                              \
    for (; c + LANES <= C; c += LANES) { constexpr int L_ = LANES; call; }      \
    for (; c < C; c++) { constexpr int L_ = 1; call; }                          \
  }
static void add_lanes(const T *sums, T *out) {
  for (int s = 0; s < HARMONICS; s++) {
    T total = 0;
    for (int l = 0; l < LANES; l++) total += sums[s * LANES + l];
    out[s] += total;
  }
}

extern "C" {

// for every receiver: sums of the messages to scalars (h) and to steerables (out)
void attend(int64_t atoms, int64_t channels, int64_t parts, int64_t heads, int64_t threads, const T *q, const T *k, const T *g, const T *v, const T *x,
            const T *sl, const T *f, const T *y, const int64_t *sender, const int64_t *receiver_starts, T *h, T *out) {
  const Sizes n = {atoms, channels, parts, heads, threads};
  const int64_t C = channels, W = parts * C;
#pragma omp parallel num_threads(threads) if (threads > 1 && receiver_starts[atoms] * channels > SMALL)
  {
    std::vector<T> sum(heads), share(3 * C);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < atoms; i++) {
      T *hi = h + i * C, *oi = out + i * HARMONICS * C;
      std::fill(hi, hi + C, T(0));
      std::fill(oi, oi + HARMONICS * C, T(0));
      for (int64_t e = receiver_starts[i]; e < receiver_starts[i + 1]; e++) {
        const int64_t j = sender[e];
        logits(n, q + i * C, k + j * C, sl + e * C, sum.data());
        for (auto &a : sum) a = a * sigmoid(a) / std::sqrt(T(C));
        spread(n, sum.data(), share.data());
        const T *fe = f + e * W, *gj = g + j * W, *vj = v + j * W, *xj = x + j * HARMONICS * C, *ye = y + e * HARMONICS;
        CHANNELS(collect<L_>(n, fe, gj, vj, share.data(), xj, ye, hi, oi, c))
      }
    }
  }
}

void attend_backward(int64_t atoms, int64_t channels, int64_t parts, int64_t heads, int64_t threads, const T *q, const T *k, const T *g, const T *v,
                     const T *x, const T *sl, const T *f, const T *y, const int64_t *sender, const int64_t *receiver, const int64_t *receiver_starts,
                     const int64_t *sender_starts, const int64_t *by_sender, const T *dh, const T *dout,
                     T *dq, T *dk, T *dg, T *dv, T *dx, T *dsl, T *df, T *dy, T *dsum) {
  const Sizes n = {atoms, channels, parts, heads, threads};
  const int64_t C = channels, W = parts * C;
#pragma omp parallel num_threads(threads) if (threads > 1 && receiver_starts[atoms] * channels > SMALL)
  {
    std::vector<T> sum(heads), alpha(heads), share(3 * C), dshare(3 * C), y_sums(HARMONICS * LANES);
#pragma omp for schedule(dynamic, 4)
    for (int64_t j = 0; j < atoms; j++) {
      T *dkj = dk + j * C, *dgj = dg + j * W, *dvj = dv + j * W, *dxj = dx + j * HARMONICS * C;
      std::fill(dkj, dkj + C, T(0));
      std::fill(dgj, dgj + W, T(0));
      std::fill(dvj, dvj + W, T(0));
      if (parts == 3) std::fill(dxj, dxj + HARMONICS * C, T(0));
      for (int64_t at = sender_starts[j]; at < sender_starts[j + 1]; at++) {
        const int64_t e = by_sender[at], i = receiver[e];
        const T *qi = q + i * C, *kj = k + j * C, *se = sl + e * C;
        logits(n, qi, kj, se, sum.data());
        for (int64_t a = 0; a < heads; a++) alpha[a] = sum[a] * sigmoid(sum[a]) / std::sqrt(T(C));
        spread(n, alpha.data(), share.data());
        const T *fe = f + e * W, *gj = g + j * W, *vj = v + j * W, *xj = x + j * HARMONICS * C, *ye = y + e * HARMONICS;
        const T *dhi = dh + i * C, *doi = dout + i * HARMONICS * C;
        T *dfe = df + e * W;
        std::fill(y_sums.begin(), y_sums.end(), T(0));
        CHANNELS(distribute<L_>(n, fe, gj, vj, share.data(), xj, ye, dhi, doi, dfe, dgj, dvj, dxj, dshare.data(), y_sums.data(), c))
        T *dye = dy + e * HARMONICS;
        std::fill(dye, dye + HARMONICS, T(0));
        add_lanes(y_sums.data(), dye);
        const int64_t wide = 3 * C / heads, narrow = C / heads;
        T *dse = dsl + e * C, *ds = dsum + e * heads;
        for (int64_t head = 0; head < heads; head++) {
          const T *d = dshare.data();
          const T total = reduce(head * wide, std::min((head + 1) * wide, W), [=](int64_t c) { return load<8>(d + c); }, [=](int64_t c) { return d[c]; });
          const T z = sigmoid(sum[head]);
          ds[head] = total * z * (1 + sum[head] * (1 - z)) / std::sqrt(T(C));
          int64_t c = head * narrow;
          for (; c + 8 <= (head + 1) * narrow; c += 8) {
            const vec<8> scaled = ds[head] * load<8>(qi + c);
            store<8>(dse + c, scaled * load<8>(kj + c));
            add<8>(dkj + c, scaled * load<8>(se + c));
          }
          for (; c < (head + 1) * narrow; c++) {
            dse[c] = ds[head] * qi[c] * kj[c];
            dkj[c] += ds[head] * qi[c] * se[c];
          }
        }
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < atoms; i++) {
      const int64_t narrow = C / heads;
      T *dqi = dq + i * C;
      std::fill(dqi, dqi + C, T(0));
      for (int64_t e = receiver_starts[i]; e < receiver_starts[i + 1]; e++) {
        const T *kj = k + sender[e] * C, *se = sl + e * C, *ds = dsum + e * heads;
        for (int64_t head = 0; head < heads; head++) {
          int64_t c = head * narrow;
          for (; c + 8 <= (head + 1) * narrow; c += 8) add<8>(dqi + c, ds[head] * load<8>(kj + c) * load<8>(se + c));
          for (; c < (head + 1) * narrow; c++) dqi[c] += ds[head] * kj[c] * se[c];
        }
      }
    }
  }
}

void perpendicular(int64_t atoms, int64_t channels, int64_t threads, const T *q, const T *p, const T *y, const int64_t *sender,
                   const int64_t *receiver_starts, T *omega) {
  const Sizes n = {atoms, channels, 0, 0, threads};
  const int64_t C = channels, W = HARMONICS * C;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1 && receiver_starts[atoms] * channels > SMALL)
  for (int64_t i = 0; i < atoms; i++)
    for (int64_t e = receiver_starts[i]; e < receiver_starts[i + 1]; e++) CHANNELS(align<L_>(n, q + i * W, p + sender[e] * W, y + e * HARMONICS, omega + e * C, c))
}

void perpendicular_backward(int64_t atoms, int64_t channels, int64_t threads, const T *q, const T *p, const T *y, const int64_t *sender,
                            const int64_t *receiver, const int64_t *receiver_starts, const int64_t *sender_starts, const int64_t *by_sender,
                            const T *gradient, T *dq, T *dp, T *dy) {
  const Sizes n = {atoms, channels, 0, 0, threads};
  const int64_t C = channels, W = HARMONICS * C;
#pragma omp parallel num_threads(threads) if (threads > 1 && receiver_starts[atoms] * channels > SMALL)
  {
    std::vector<T> y_sums(HARMONICS * LANES);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < atoms; i++) {
      std::fill(dq + i * W, dq + (i + 1) * W, T(0));
      for (int64_t e = receiver_starts[i]; e < receiver_starts[i + 1]; e++) {
        std::fill(y_sums.begin(), y_sums.end(), T(0));
        CHANNELS(align_gradient<L_>(n, q + i * W, p + sender[e] * W, y + e * HARMONICS, gradient + e * C, dq + i * W, y_sums.data(), c))
        std::fill(dy + e * HARMONICS, dy + (e + 1) * HARMONICS, T(0));
        add_lanes(y_sums.data(), dy + e * HARMONICS);
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t j = 0; j < atoms; j++) {
      std::fill(dp + j * W, dp + (j + 1) * W, T(0));
      for (int64_t at = sender_starts[j]; at < sender_starts[j + 1]; at++) {
        const int64_t e = by_sender[at];
        CHANNELS(align_gradient<L_>(n, p + j * W, q + receiver[e] * W, y + e * HARMONICS, gradient + e * C, dp + j * W, nullptr, c))
      }
    }
  }
}
}
