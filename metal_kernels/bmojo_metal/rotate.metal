    // Heads of up to five arrays, each rotated by angles of its own: one thread a pair (j, j + P / 2) of a head.
    // `turned` holds the arrays one after the other.
    const int pair = int(thread_position_in_grid.x), batch = int(x0_shape[0]);
    int head = int(thread_position_in_grid.y);
    const int heads0 = int(x0_shape[1]), heads1 = int(x1_shape[1]), heads2 = int(x2_shape[1]);
    const int heads3 = int(x3_shape[1]), heads4 = int(x4_shape[1]);
    const int end0 = batch * heads0, end1 = end0 + batch * heads1, end2 = end1 + batch * heads2;
    const int end3 = end2 + batch * heads3;
    if (head < end0) {
        bmojo_rotate<T, P>(turned, x0, cos0, sin0, cos0_shape[0] == 1, heads0, head, pair);
    } else if (head < end1) {
        bmojo_rotate<T, P>(turned + end0 * P, x1, cos1, sin1, cos1_shape[0] == 1, heads1, head - end0, pair);
    } else if (head < end2) {
        bmojo_rotate<T, P>(turned + end1 * P, x2, cos2, sin2, cos2_shape[0] == 1, heads2, head - end1, pair);
    } else if (head < end3) {
        bmojo_rotate<T, P>(turned + end2 * P, x3, cos3, sin3, cos3_shape[0] == 1, heads3, head - end2, pair);
    } else {
        bmojo_rotate<T, P>(turned + end3 * P, x4, cos4, sin4, cos4_shape[0] == 1, heads4, head - end3, pair);
    }
