FUNCTION void clear(THREAD(MatrixC)& c) {
  for (int i = 0; i < 4; ++i) put(c, i, 0.0f);
}
