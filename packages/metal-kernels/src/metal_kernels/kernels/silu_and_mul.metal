// Multiplies the second half of each row by the SiLU of the first. A thread takes four elements.
const long row = long(threadgroup_position_in_grid.x);
const int at = (int(threadgroup_position_in_grid.y) * THREADS + int(thread_position_in_threadgroup.x)) * 4;
if (at < WIDTH) {
  float gate[4];
  float up[4];
  load_f32<4>(gate_up_in + row * 2 * WIDTH + at, gate);
  load_f32<4>(gate_up_in + row * 2 * WIDTH + WIDTH + at, up);
  UNROLL for (int i = 0; i < 4; ++i) up[i] *= gate[i] / (1.0f + exp2_fast(-1.44269504f * gate[i]));
  store_f32<4>(out + row * WIDTH + at, up);
}
