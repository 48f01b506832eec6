    // One token of innovation.metal, its score put into the ring of scores. Rows that rest keep ring and past.
    // One SIMD-group a row.
    const int lane = int(thread_index_in_simdgroup), row = int(threadgroup_position_in_grid.y);
    const int channels = int(signal_shape[1]), slots = int(ring_shape[1]);
    const bool moves = active[row];
    float missed = 0.0f, size = 0.0f;
    for (int channel = lane; channel < channels; channel += 32) {
        const float value = signal[int64_t(row) * channels + channel];
        float miss = value;
        for (int tap = 0; tap < TAPS; ++tap) {
            const int64_t at = (int64_t(row) * TAPS + tap) * channels + channel;
            miss -= coefficients[TAPS - 1 - tap] * past[at];
            last[at] = !moves ? past[at] : tap < TAPS - 1 ? past[at + channels] : value;
        }
        missed += miss * miss;
        size += value * value;
    }
    missed = bmojo_sum<32>(missed);
    size = bmojo_sum<32>(size);
    const float score = RELATIVE ? missed / (size + 1e-6f) : missed;
    const int slot = moves ? int(position[row] % slots) : slots;
    for (int i = lane; i < slots; i += 32) {
        new_ring[int64_t(row) * slots + i] = i == slot ? score : ring[int64_t(row) * slots + i];
    }
