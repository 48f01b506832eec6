    // One token of Mamba-1 between its two large projections: convolution and SiLU, projection to dt, B and C, their
    // norms, dt's own projection and softplus, scan, skip and gate. A threadgroup takes `share` channels of a row.
    // Every channel adds to dt, B and C, so each threadgroup computes these for itself.
    constexpr int GROUPS = 8, ROWS = 4, WIDTH = R + 2 * N;
    constexpr int STATES = (N + LANES - 1) / LANES, TOGETHER = 32 * GROUPS / LANES;
    threadgroup float tile[TILE];  // convolved channels
    threadgroup float shared[WIDTH];  // R numbers that become dt, then B and C
    const int thread_index = int(thread_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup), row = int(threadgroup_position_in_grid.y);
    const int channels = int(state_shape[1]);
    const ulong past_at = ulong(row) * (TAPS - 1) * channels, x_at = ulong(row) * 2 * channels;

    for (int begin = 0; begin < channels; begin += TILE) {
        const int end = metal::min(begin + TILE, channels);
        for (int channel = begin + thread_index; channel < end; channel += 32 * GROUPS) {
            tile[channel - begin] = bmojo_conv_token<TAPS, HAS_BIAS>(
                xz + x_at, past + past_at, conv_weight, conv_bias, channels, channel);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is there
        for (int first = group * ROWS; first < WIDTH; first += GROUPS * ROWS) {
            bmojo_row_sums<ROWS> sums;
            for (int r = 0; r < ROWS; ++r) {
                sums.of[r] = 0.0f;
            }
            bmojo_add_products<ROWS, 32, BITS, GROUP>(
                sums, tile, x_weight, x_scales, x_offsets, first, WIDTH, channels, begin, end, lane);
            for (int r = 0; r < ROWS; ++r) {
                const float sum = bmojo_sum<32>(sums.of[r]);
                if (lane == 0 && first + r < WIDTH) {
                    shared[first + r] = begin == 0 ? sum : shared[first + r] + sum;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is read, dt, B and C are there
    }
    if (NORMED) {
        if (group < 3) {
            const int from = group == 0 ? 0 : R + (group - 1) * N, count = group == 0 ? R : N;
            float square = 0.0f;
            for (int i = lane; i < count; i += 32) {
                square += shared[from + i] * shared[from + i];
            }
            const float factor = metal::rsqrt(bmojo_sum<32>(square) / float(count) + eps);
            for (int i = lane; i < count; i += 32) {
                const float weight = group == 0 ? float(dt_norm[i]) : group == 1 ? float(B_norm[i]) : float(C_norm[i]);
                shared[from + i] *= factor * weight;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // dt, B and C are normalised
    }

    const bool moves = active[row];
    const int stop = metal::min((int(threadgroup_position_in_grid.x) + 1) * int(share), channels);
    const int first_state = thread_index % LANES * STATES;
    for (int base = int(threadgroup_position_in_grid.x) * int(share); base < stop; base += TOGETHER) {
        const bool inside = base + thread_index / LANES < stop;  // lanes to spare shuffle along
        const int channel = inside ? base + thread_index / LANES : stop - 1;
        bmojo_row_sums<1> product;
        product.of[0] = 0.0f;
        bmojo_add_products<1, LANES, DT_BITS, DT_GROUP>(
            product, shared, dt_weight, dt_scales, dt_offsets, channel, channels, R, 0, R, thread_index % LANES);
        const float step = bmojo_softplus(bmojo_sum<LANES>(product.of[0]) + float(dt_bias[channel]));
        const float in = bmojo_conv_token<TAPS, HAS_BIAS>(
            xz + x_at, past + past_at, conv_weight, conv_bias, channels, channel);
        float out = 0.0f;
        for (int n = first_state; n < metal::min(first_state + STATES, N); ++n) {
            const ulong at = (ulong(row) * channels + channel) * N + n;
            const float before = state[at], a = -metal::exp(float(A_log[channel * N + n]));
            const float s = metal::exp(step * a) * before + step * in * shared[R + n];
            out += s * shared[R + N + n];
            if (inside) {
                new_state[at] = moves ? s : before;
            }
        }
        out = bmojo_sum<LANES>(out);
        if (inside && first_state == 0) {
            const float gate = bmojo_silu(float(xz[x_at + channels + channel]));
            y[ulong(row) * channels + channel] = T(moves ? (out + float(D[channel]) * in) * gate : 0.0f);
            for (int tap = 0; tap < TAPS - 1; ++tap) {
                const ulong at = past_at + ulong(tap) * channels + channel;
                last[at] = !moves ? T(past[at]) : tap < TAPS - 2 ? T(past[at + channels]) : T(xz[x_at + channel]);
            }
        }
    }
