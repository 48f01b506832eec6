    // First pass over long prompts: what each chunk adds to a state of zero, and the sum of its dt.
    // Lanes and states as in scan.metal. The last chunk is not needed.
    constexpr int STATES = (N + LANES - 1) / LANES;
    const int index = int(thread_position_in_grid.x), chunk = int(thread_position_in_grid.y);
    const int row = int(thread_position_in_grid.z), chunks = int(threads_per_grid.y);
    const int channels = int(x_shape[2]);
    const int first_state = index % LANES * STATES, channel = index / LANES;
    if (channel >= channels) return;  // nothing here is shared between lanes
    const int begin = chunk * chunk_size, end = metal::min(begin + chunk_size, int(lengths[row]));

    float s[STATES], a[STATES];
    for (int j = 0; j < STATES; ++j) {
        const int n = first_state + j;
        s[j] = 0.0f;
        a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 0.0f;
    }
    float sum = 0.0f;
    const int64_t x_at = row * x_strides[0] + channel * x_strides[2];
    const int64_t dt_at = row * dt_strides[0] + channel * dt_strides[2];
    for (int i = begin; i < end; ++i) {
        const float in = float(x[x_at + i * x_strides[1]]);
        const float step = bmojo_softplus(float(dt[dt_at + i * dt_strides[1]]));
        const int64_t b_at = row * B_strides[0] + i * B_strides[1];
        sum += step;
        for (int j = 0; j < STATES; ++j) {
            const int n = first_state + j;
            const float b = n < N ? float(B[b_at + n * B_strides[2]]) : 0.0f;
            s[j] = metal::exp(step * a[j]) * s[j] + step * in * b;
        }
    }
    const int64_t at = (int64_t(row) * chunks + chunk) * channels + channel;
    for (int j = 0; j < STATES && first_state + j < N; ++j) ends[at * N + first_state + j] = s[j];
    if (first_state == 0) sums[at] = sum;
