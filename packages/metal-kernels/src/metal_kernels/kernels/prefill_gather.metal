// Copies the keys and values of one request out of their pages, each head's rows together. A thread takes 8 elements.
constexpr int TOKEN_CHUNKS = KV_HEADS * (HEAD_SIZE / 8);
const int tokens = tokens_in[0];
const int at = int(threadgroup_position_in_grid.x) * THREADS + int(thread_position_in_threadgroup.x);
const int token = at / TOKEN_CHUNKS;
const int half_page = int(threadgroup_position_in_grid.y);
if (token < tokens) {
  const int head = at % TOKEN_CHUNKS / (HEAD_SIZE / 8);
  const int i = at % (HEAD_SIZE / 8) * 8;
  const long block = blocks_in[token / BLOCK_SIZE];
  const long from = (((block * 2 + half_page) * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + head) * HEAD_SIZE + i;
  const long to = ((long(half_page) * KV_HEADS + head) * tokens + token) * HEAD_SIZE + i;
  *(DEV(uint4)*)(out + to) = *(const DEV(uint4)*)(kv_cache_in + from);
}
