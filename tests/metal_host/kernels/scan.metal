    // A selective scan: one SIMD-group per (batch, channel), a lane per state, the steps in sequence.
    const uint lane = thread_index_in_simdgroup;
    const uint channels = A_shape[0], steps = x_shape[1];
    const uint channel = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
    const uint batch = threadgroup_position_in_grid.y;
    if (channel >= channels) return;  // the whole SIMD-group
    const float a = A[channel * 32 + lane];
    const float skip = D[channel];
    float h = h0[(batch * channels + channel) * 32 + lane];
    for (uint t = 0; t < steps; ++t) {
        const uint row = batch * steps + t;
        const float step = softplus(float(dt[row * channels + channel]));
        const float x_t = float(x[row * channels + channel]);
        h = metal::fma(metal::exp(step * a), h, step * float(B[row * 32 + lane]) * x_t);
        const float y_t = simd_sum(h * float(C[row * 32 + lane]));
        if (lane == 0) y[row * channels + channel] = T(y_t + skip * x_t);
    }
    h_last[(batch * channels + channel) * 32 + lane] = h;
