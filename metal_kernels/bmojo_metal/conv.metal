    // SiLU of a depthwise causal convolution, oldest tap first, and the last TAPS - 1 real inputs of each row.
    // One thread a channel and token. `past` holds the TAPS - 1 inputs before the first token.
    const int channel = int(thread_position_in_grid.x), step = int(thread_position_in_grid.y);
    const int row = int(thread_position_in_grid.z);
    const int steps = int(x_shape[1]), channels = int(x_shape[2]);
    const int64_t x_at = row * x_strides[0] + channel * x_strides[2];
    const int64_t past_at = int64_t(row) * (TAPS - 1) * channels + channel;
    float sum = HAS_BIAS ? float(bias[channel]) : 0.0f;
    for (int tap = 0; tap < TAPS; ++tap) {
        const int from = step + tap - (TAPS - 1);
        const float value = from < 0 ? float(past[past_at + int64_t(from + TAPS - 1) * channels])
                                     : float(x[x_at + from * x_strides[1]]);
        sum += value * float(weight[channel * TAPS + tap]);
    }
    y[(int64_t(row) * steps + step) * channels + channel] = T(bmojo_silu(sum));
    // Tokens may be fewer than taps: the first ones then write several.
    for (int tap = step; tap < TAPS - 1; tap += steps) {
        const int from = int(lengths[row]) + tap - (TAPS - 1);
        last[past_at + int64_t(tap) * channels] =
            from < 0 ? past[past_at + int64_t(from + TAPS - 1) * channels] : T(x[x_at + from * x_strides[1]]);
    }
