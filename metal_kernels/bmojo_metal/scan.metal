    // y = (C s + D x) SiLU(z) after s <- exp(dt A) s + dt B x, dt = softplus(steps), A = -exp(A_log), token by token.
    // LANES lanes share a channel, each with STATES of its N states in registers: no lane waits for another but in the
    // sum over states. Chunks of a row run side by side, each from its own start.
    constexpr int STATES = (N + LANES - 1) / LANES;
    const int index = int(thread_position_in_grid.x), chunk = int(thread_position_in_grid.y);
    const int row = int(thread_position_in_grid.z), chunks = int(threads_per_grid.y);
    const int tokens = int(x_shape[1]), channels = int(x_shape[2]);
    const int first_state = index % LANES * STATES;
    const bool inside = index / LANES < channels;  // the last SIMD-group may have lanes to spare; they shuffle along
    const int channel = inside ? index / LANES : channels - 1;
    const int begin = chunk * chunk_size, end = metal::min(begin + chunk_size, tokens);
    const int real_end = metal::min(end, int(lengths[row]));

    float s[STATES], a[STATES];
    for (int j = 0; j < STATES; ++j) {
        const int n = first_state + j;
        const int64_t at = ((int64_t(row) * chunks + chunk) * channels + channel) * N + n;
        s[j] = n < N ? starts[at] : 0.0f;
        a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 0.0f;
    }
    const float skip = float(D[channel]);
    const int64_t y_at = int64_t(row) * tokens * channels + channel;
    const int64_t x_at = row * x_strides[0] + channel * x_strides[2];
    const int64_t dt_at = row * dt_strides[0] + channel * dt_strides[2];
    const int64_t z_at = row * z_strides[0] + channel * z_strides[2];
    for (int i = begin; i < real_end; ++i) {
        const float in = float(x[x_at + i * x_strides[1]]);
        const float step = bmojo_softplus(float(dt[dt_at + i * dt_strides[1]]));
        const int64_t b_at = row * B_strides[0] + i * B_strides[1], c_at = row * C_strides[0] + i * C_strides[1];
        float out = 0.0f;
        for (int j = 0; j < STATES; ++j) {
            const int n = first_state + j;
            const float b = n < N ? float(B[b_at + n * B_strides[2]]) : 0.0f;
            const float c = n < N ? float(C[c_at + n * C_strides[2]]) : 0.0f;
            s[j] = metal::exp(step * a[j]) * s[j] + step * in * b;
            out += s[j] * c;
        }
        out = bmojo_sum<LANES>(out);
        if (inside && first_state == 0) {
            const float gate = bmojo_silu(float(z[z_at + i * z_strides[1]]));
            y[y_at + int64_t(i) * channels] = T((out + skip * in) * gate);
        }
    }
    if (inside && first_state == 0) {
        for (int i = metal::max(begin, real_end); i < end; ++i) y[y_at + int64_t(i) * channels] = T(0.0f);
    }
    if (inside && chunk == chunks - 1) {
        for (int j = 0; j < STATES && first_state + j < N; ++j) {
            last[(int64_t(row) * channels + channel) * N + first_state + j] = s[j];
        }
    }
