// Helpers of all kernels of this package. Their names begin with bmojo_.

// log(1 + e) for e >= 0, also where 1 + e rounds most of e away.
inline float bmojo_log1p(float e) {
    const float u = 1.0f + e;
    return u == 1.0f ? e : metal::log(u) * (e / (u - 1.0f));
}

// log(1 + exp(x)).
inline float bmojo_softplus(float x) {
    return metal::max(x, 0.0f) + bmojo_log1p(metal::exp(-metal::abs(x)));
}

// x * sigmoid(x).
inline float bmojo_silu(float x) {
    return x / (1.0f + metal::exp(-x));
}

// The sum over each LANES neighbouring lanes, a power of two, as one fixed tree: the same bits in every run.
template <int LANES, typename Number>
inline Number bmojo_sum(Number x) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += metal::simd_shuffle_xor(x, ushort(distance));
    return x;
}

// A score as an integer that orders as the scores do, -1 where its token may not be chosen.
inline int bmojo_eidetic_key(float score, int64_t position, int64_t first, int64_t limit) {
    return position >= first && position < limit ? as_type<int>(score) : -1;
}
