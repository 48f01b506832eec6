    // A selective scan with one thread per (batch, channel) and its 16 states in registers: no synchronisation at all.
    const uint channel = thread_position_in_grid.x, batch = thread_position_in_grid.y;
    const uint channels = A_shape[0], steps = x_shape[1];
    float h[16], a[16];
    for (int s = 0; s < 16; ++s) {
        h[s] = 0.0f;
        a[s] = A[channel * 16 + s];
    }
    for (uint t = 0; t < steps; ++t) {
        const uint row = batch * steps + t;
        const float step = float(dt[row * channels + channel]), x_t = float(x[row * channels + channel]);
        float y_t = 0.0f;
        for (int s = 0; s < 16; ++s) {
            h[s] = metal::fma(metal::exp(step * a[s]), h[s], step * float(B[row * 16 + s]) * x_t);
            y_t += h[s] * float(C[row * 16 + s]);
        }
        y[row * channels + channel] = T(y_t);
    }
