    // How badly a fixed average of the TAPS values before a token predicts it, and the last TAPS real values of each row.
    // One SIMD-group a token. `past` holds the TAPS values before the first token, oldest first.
    const int lane = int(thread_index_in_simdgroup);
    const int step = int(threadgroup_position_in_grid.y), row = int(threadgroup_position_in_grid.z);
    const int steps = int(signal_shape[1]), channels = int(signal_shape[2]), length = int(lengths[row]);
    const int64_t signal_at = int64_t(row) * steps * channels, past_at = int64_t(row) * TAPS * channels;
    float missed = 0.0f, size = 0.0f;
    for (int channel = lane; channel < channels; channel += 32) {
        const float value = signal[signal_at + int64_t(step) * channels + channel];
        float miss = value;
        for (int tap = 1; tap <= TAPS; ++tap) {
            const int from = step - tap;
            const float before = from < 0 ? past[past_at + int64_t(TAPS + from) * channels + channel]
                                          : signal[signal_at + int64_t(from) * channels + channel];
            miss -= coefficients[tap - 1] * before;
        }
        missed += miss * miss;
        size += value * value;
        // Tokens may be fewer than taps: the first ones then write several.
        for (int tap = step; tap < TAPS; tap += steps) {
            const int from = length + tap - TAPS;
            last[past_at + int64_t(tap) * channels + channel] =
                from < 0 ? past[past_at + int64_t(TAPS + from) * channels + channel]
                         : signal[signal_at + int64_t(from) * channels + channel];
        }
    }
    missed = bmojo_sum<32>(missed);
    size = bmojo_sum<32>(size);
    if (lane == 0) {
        const float score = RELATIVE ? missed / (size + 1e-6f) : missed;
        scores[int64_t(row) * steps + step] = step < length ? score : 0.0f;
    }
