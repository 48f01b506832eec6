    // The shares of memory_attention_step become its result: a thread takes one element of one head.
    const uint i = thread_position_in_grid.x;
    const int place = int(i) / HEAD_DIM, rows = int(stats_shape[1]), parts = int(stats_shape[0]);
    float m = -INFINITY, l = 0.0f, o = 0.0f;
    for (int s = 0; s < parts; ++s) {
        m = metal::max(m, stats[2 * (s * rows + place)]);
    }
    for (int s = 0; s < parts; ++s) {
        const int at = s * rows + place;
        const float factor = stats[2 * at] == -INFINITY ? 0.0f : metal::exp(stats[2 * at] - m);
        l += stats[2 * at + 1] * factor;
        o += mixed[ulong(s) * rows * HEAD_DIM + i] * factor;
    }
    out[i] = T(o / l);
