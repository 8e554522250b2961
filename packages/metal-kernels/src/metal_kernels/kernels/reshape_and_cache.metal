// Writes rows in place. One thread per element of a key row; a threadgroup row is part of one token.
const int token = int(threadgroup_position_in_grid.x);
const int element = int(threadgroup_position_in_grid.y) * THREADS + int(thread_position_in_threadgroup.x);
if (token == 0 && element < 8) order_out[element] = 0;
const int slot = slots_in[token];
if (slot >= 0 && element < KV_HEADS * HEAD_SIZE) {
  const int head = element / HEAD_SIZE;
  const int i = element % HEAD_SIZE;
  const int block = slot / BLOCK_SIZE;
  const long page = long(2) * BLOCK_SIZE * KV_HEADS * HEAD_SIZE;
  const long at = block * page + long(slot % BLOCK_SIZE) * KV_HEADS * HEAD_SIZE + element;
  DEV(T)* pages = const_cast<DEV(T)*>(kv_cache_in);
  pages[at] = key_in[token * key_in_strides[0] + head * key_in_strides[1] + i * key_in_strides[2]];
  pages[at + page / 2] = value_in[token * value_in_strides[0] + head * value_in_strides[1] + i * value_in_strides[2]];
}
