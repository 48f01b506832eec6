    // New eidetic slots: columns below E are the old slots, those after are tokens that leave the window, un-rotated.
    // One thread an element of a slot. Rows that are not due keep their slots as they are.
    const int dim = int(thread_position_in_grid.x), slot = int(thread_position_in_grid.y);
    const int row_head = int(thread_position_in_grid.z);
    const int heads = int(k_shape[1]), E = int(k_shape[2]), P = int(k_shape[3]), window = int(ring_k_shape[2]);
    const int row = row_head / heads, n = int(scores_shape[1]);
    const int column = rows[row] ? index[row * E + slot] : slot;
    const int64_t to = (int64_t(row_head) * E + slot) * P + dim;
    T key = T(0.0f), value = T(0.0f);
    if (column >= E) {
        const int64_t held = position[row * n + column] % window;
        const int64_t at = (int64_t(row_head) * window + held) * P;
        float turned = float(ring_k[at + dim]);
        if (ROTATED) {
            const int half_size = P / 2, pair = dim % half_size;
            const int64_t angle = (int64_t(row) * (n - E) + column - E) * half_size + pair;
            const float other = float(ring_k[at + (dim + half_size) % P]) * sin[angle];
            turned = turned * cos[angle] + (dim < half_size ? other : -other);
        }
        key = T(turned);
        value = ring_v[at + dim];
    } else if (column >= 0) {
        key = k[(int64_t(row_head) * E + column) * P + dim];
        value = v[(int64_t(row_head) * E + column) * P + dim];
    }
    new_k[to] = key;
    new_v[to] = value;
    if (dim == 0 && row_head == row * heads) {
        new_scores[row * E + slot] = column < 0 ? 0.0f : scores[row * n + column];
        new_position[row * E + slot] = column < 0 ? -1 : position[row * n + column];
    }
