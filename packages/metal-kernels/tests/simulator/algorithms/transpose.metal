constexpr uint TILE = 8, ROWS = 20, COLS = 12;
threadgroup float tile[TILE][TILE + 1];
const uint2 t = thread_position_in_threadgroup.xy, g = threadgroup_position_in_grid.xy;
uint row = g.y * TILE + t.y, col = g.x * TILE + t.x;
if (row < ROWS && col < COLS)
    tile[t.y][t.x] = a[row * COLS + col];
threadgroup_barrier(mem_flags::mem_threadgroup);
uint row_out = g.x * TILE + t.y, col_out = g.y * TILE + t.x;
if (row_out < COLS && col_out < ROWS)
    out[row_out * ROWS + col_out] = tile[t.x][t.y];
