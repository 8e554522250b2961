uint3 p = thread_position_in_grid;
int id = ids[p.z * 3 + p.y];
uint to = (p.z * 3 + p.y) * 16 + p.x;
out[to] = id >= 0 && id < 6 ? table[id * 16 + p.x] : T(0);
