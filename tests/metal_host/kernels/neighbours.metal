    // Each thread averages with its neighbours, again and again: two barriers a step and little else.
    threadgroup float shared_values[256];
    const uint here = thread_index_in_threadgroup;
    float value = x[thread_position_in_grid.x];
    for (int step = 0; step < STEPS; ++step) {
        shared_values[here] = value;
        threadgroup_barrier(mem_flags::mem_threadgroup);  // everybody's value is there
        value = 0.5f * value + 0.25f * shared_values[(here + 1) & 255] + 0.25f * shared_values[(here + 255) & 255];
        threadgroup_barrier(mem_flags::mem_threadgroup);  // and has been read
    }
    out[thread_position_in_grid.x] = value;
