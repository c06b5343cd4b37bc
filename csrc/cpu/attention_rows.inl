// Rows in, rows out, and rows together. A part of attention_kernels.inl.

namespace foretoken::cpu {

namespace {

template <class From>
inline void widen_from(const void* elements, int64_t count, int64_t padded, float factor, float* out) {
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Vec line = d < count ? From::load(elements, d, count) : Vec::zero();
    multiply(line, Vec::all(factor)).store(out + d);
  }
}

void widen(const void* elements, DType dtype, int64_t count, int64_t padded, float factor, float* out) {
  switch (dtype) {
    case DType::bfloat16: return widen_from<Source<DType::bfloat16>>(elements, count, padded, factor, out);
    case DType::float16: return widen_from<Source<DType::float16>>(elements, count, padded, factor, out);
    default: return widen_from<Source<DType::float32>>(elements, count, padded, factor, out);
  }
}

void merge(int64_t rows, int64_t padded, const PartialRows& left, const PartialRows& right) {
  for (int64_t row = 0; row < rows; ++row) {
    float* values = left.values + row * padded;
    const float* more = right.values + row * padded;
    if (right.sums[row] == 0.0f) continue;
    if (left.sums[row] == 0.0f) {
      left.maxima[row] = right.maxima[row];
      left.sums[row] = right.sums[row];
      std::copy(more, more + padded, values);
      continue;
    }
    const float max = std::max(left.maxima[row], right.maxima[row]);
    const float mine = first_of(exp2_of(Vec::all(left.maxima[row] - max)));
    const float other = first_of(exp2_of(Vec::all(right.maxima[row] - max)));
    left.maxima[row] = max;
    left.sums[row] = left.sums[row] * mine + right.sums[row] * other;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const Vec scaled = multiply(Vec::load(more + d), Vec::all(other));
      multiply_add(Vec::load(values + d), Vec::all(mine), scaled).store(values + d);
    }
  }
}

template <DType dtype>
inline void narrow_to(const float* values, int64_t count, float factor, void* out) {
  constexpr int64_t kBytes = bytes_of(dtype);
  char* to = static_cast<char*>(out);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    multiply(Vec::load(values + d), Vec::all(factor)).narrow(Kind<dtype>{}, to + d * kBytes);
  }
  if (d == count) return;
  alignas(64) char part[sizeof(float) * kMaxLanes];
  multiply(Vec::load(values + d), Vec::all(factor)).narrow(Kind<dtype>{}, part);
  std::memcpy(to + d * kBytes, part, static_cast<size_t>((count - d) * kBytes));
}

void narrow(const float* values, int64_t count, float factor, DType dtype, void* out) {
  switch (dtype) {
    case DType::bfloat16: return narrow_to<DType::bfloat16>(values, count, factor, out);
    case DType::float16: return narrow_to<DType::float16>(values, count, factor, out);
    default: return narrow_to<DType::float32>(values, count, factor, out);
  }
}

}  // namespace

}  // namespace foretoken::cpu
