// Images to the patches of a vision tower in one pass: Pillow's resize of 8-bit images, bit for bit, and a table of what
// each pixel value becomes. See kernels/image_patches.py.
//
// Pillow resizes first along rows (but see `rows_first` there), then along columns, with taps in 22-bit fixed point and a
// rounding to 8 bits behind each (src/libImaging/Resample.c). Sums of integers are exact: their order does not matter.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace {

using at::Tensor;
using namespace axpo;

constexpr int kBits = 22;
constexpr int64_t kPixel = 4;  // bytes: red, green, blue, and one that is not looked at

typedef int32_t i32x4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i32x16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));

// How `out` pixels of a side come from `in`: pixel i is the sum of taps[i][0 .. width-1] times the pixels from first[i].
struct Axis {
  const int32_t *first, *taps;
  int64_t in, out, width;
};

AXPO_INLINE void clip(const int32_t* sums, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t value = (sums[i] + (1 << (kBits - 1))) >> kBits;
    to[i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
  }
}

// [rows][in] pixels -> [rows][out] pixels. lanes: of each result its taps, four of them in the 16 lanes of four pixels,
// `groups` times. row and sums: room for a row of either side, and
// in row for the pixels behind it that meet taps of zero.
AXPO_CLONES void resize_rows(const uint8_t* from, int64_t rows, const Axis& x, const int32_t* lanes, int64_t groups,
                             int32_t* row, int32_t* sums, uint8_t* to) {
  const int64_t bytes = x.in * kPixel;
  for (int64_t r = 0; r < rows; ++r, from += bytes, to += x.out * kPixel) {
    for (int64_t i = 0; i < bytes; ++i) row[i] = from[i];
    const int32_t* tap = lanes;
    for (int64_t i = 0; i < x.out; ++i) {
      const int32_t* p = row + x.first[i] * kPixel;
      i32x16 sum = {};
      for (int64_t g = 0; g < groups; ++g, p += 16, tap += 16) {
        sum += *reinterpret_cast<const i32x16_unaligned*>(p) * *reinterpret_cast<const i32x16_unaligned*>(tap);
      }
      alignas(64) int32_t parts[16];
      *reinterpret_cast<i32x16_unaligned*>(parts) = sum;
      const auto* quarter = reinterpret_cast<const i32x4_unaligned*>(parts);
      *reinterpret_cast<i32x4_unaligned*>(sums + i * kPixel) = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    }
    clip(sums, x.out * kPixel, to);
  }
}

// [in] rows of `bytes` -> [out] rows. sums: room for one.
AXPO_CLONES void resize_columns(const uint8_t* from, int64_t bytes, const Axis& y, int32_t* sums, uint8_t* to) {
  for (int64_t i = 0; i < y.out; ++i, to += bytes) {
    const uint8_t* row = from + y.first[i] * bytes;
    const int64_t taps = std::min(y.width, y.in - y.first[i]);
    for (int64_t b = 0; b < bytes; ++b) sums[b] = 0;
    for (int64_t t = 0; t < taps; ++t, row += bytes) {
      const int32_t tap = y.taps[i * y.width + t];
      for (int64_t b = 0; b < bytes; ++b) sums[b] += tap * row[b];
    }
    clip(sums, bytes, to);
  }
}

struct Layout {
  const float* table;  // [3][256]
  int64_t patch, merge, frames;
};

// from: [height][width] pixels; patches: [P][3][frames][patch][patch], in blocks of merge x merge; rgb: [height][width][3]
void cut(const uint8_t* from, int64_t height, int64_t width, const Layout& l, float* patches, uint8_t* rgb) {
  for (int64_t i = 0; i < height * width; ++i) std::memcpy(rgb + 3 * i, from + kPixel * i, 3);
  const int64_t block = l.patch * l.merge, area = l.patch * l.patch;
  for (int64_t by = 0; by < height; by += block) {
    for (int64_t bx = 0; bx < width; bx += block) {
      for (int64_t y0 = by; y0 < by + block; y0 += l.patch) {
        for (int64_t x0 = bx; x0 < bx + block; x0 += l.patch) {
          for (int64_t c = 0; c < 3; ++c, patches += l.frames * area) {
            const float* values = l.table + 256 * c;
            for (int64_t y = 0; y < l.patch; ++y) {
              const uint8_t* p = from + ((y0 + y) * width + x0) * kPixel + c;
              for (int64_t x = 0; x < l.patch; ++x) patches[y * l.patch + x] = values[p[x * kPixel]];
            }
            for (int64_t f = 1; f < l.frames; ++f) std::memcpy(patches + f * area, patches, area * sizeof(float));
          }
        }
      }
    }
  }
}

void process(const uint8_t* image, const Axis& x, const Axis& y, const Layout& l, float* patches, uint8_t* rgb) {
  std::vector<uint8_t> narrow, small;
  std::vector<int32_t> row, sums(x.out * kPixel);
  if (x.width > 0) {
    const int64_t groups = (x.width + 3) / 4;
    row.resize((x.in + groups * 4) * kPixel);
    std::vector<int32_t> lanes(x.out * groups * 16);
    for (int64_t i = 0; i < x.out; ++i) {
      for (int64_t t = 0; t < x.width; ++t) {
        for (int64_t c = 0; c < kPixel; ++c) lanes[(i * groups * 4 + t) * kPixel + c] = x.taps[i * x.width + t];
      }
    }
    narrow.resize(y.in * x.out * kPixel);
    resize_rows(image, y.in, x, lanes.data(), groups, row.data(), sums.data(), narrow.data());
    image = narrow.data();
  }
  if (y.width > 0) {
    small.resize(y.out * x.out * kPixel);
    resize_columns(image, x.out * kPixel, y, sums.data(), small.data());
    image = small.data();
  }
  cut(image, y.out, x.out, l, patches, rgb);
}

Axis axis(const Tensor& first, const Tensor& taps, int64_t in, const char* side, int64_t image) {
  TORCH_CHECK_VALUE(first.scalar_type() == at::kInt && taps.scalar_type() == at::kInt && first.is_contiguous() &&
                        taps.is_contiguous() && taps.dim() == 2 && taps.size(0) == first.numel(),
                    "image_patches: first and taps along the ", side, " of image ", image, " must be int32 [n], [n, k]");
  const int32_t* begin = first.const_data_ptr<int32_t>();
  const int64_t out = first.numel(), width = taps.size(1);
  for (int64_t i = 0; i < out; ++i) {
    TORCH_CHECK_INDEX(begin[i] >= 0 && begin[i] < in, "image_patches: first[", i, "] = ", begin[i], " along the ", side,
                      " of image ", image, ", which has ", in, " pixels there");
  }
  TORCH_CHECK_VALUE(width > 0 || out == in, "image_patches: the ", side, " of image ", image, " is ", in,
                    " pixels and stays so without taps, not ", out);
  return {begin, taps.const_data_ptr<int32_t>(), in, out, width};
}

std::vector<Tensor> image_patches(at::TensorList images, at::TensorList axes, const Tensor& table, int64_t patch,
                                  int64_t merge, int64_t frames) {
  const int64_t count = static_cast<int64_t>(images.size()), block = patch * merge;
  TORCH_CHECK_VALUE(static_cast<int64_t>(axes.size()) == 4 * count, "image_patches: ", axes.size(),
                    " axis tensors for ", count, " images; four each");
  TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.numel() == 768 && table.is_contiguous(),
                    "image_patches: the table must be fp32 [3, 256]");
  TORCH_CHECK_VALUE(patch > 0 && merge > 0 && frames > 0, "image_patches: patch, merge and frames must be positive");
  const Layout layout{table.const_data_ptr<float>(), patch, merge, frames};
  std::vector<Axis> x, y;
  std::vector<Tensor> out;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& image = images[i];
    TORCH_CHECK_VALUE(image.dim() == 3 && image.size(2) == kPixel && image.scalar_type() == at::kByte &&
                          image.is_contiguous(),
                      "image_patches: image ", i, " must be uint8 [height, width, 4]");
    x.push_back(axis(axes[4 * i], axes[4 * i + 1], image.size(1), "width", i));
    y.push_back(axis(axes[4 * i + 2], axes[4 * i + 3], image.size(0), "height", i));
    const int64_t height = y[i].out, width = x[i].out;
    TORCH_CHECK_VALUE(height % block == 0 && width % block == 0, "image_patches: image ", i, " becomes ", height, "x",
                      width, " pixels, not multiples of ", block);
    out.push_back(at::empty({height * width / (patch * patch), 3 * frames * patch * patch}, table.options()));
    out.push_back(at::empty({height, width, 3}, image.options()));
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      process(images[i].const_data_ptr<uint8_t>(), x[i], y[i], layout, out[2 * i].mutable_data_ptr<float>(),
              out[2 * i + 1].mutable_data_ptr<uint8_t>());
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "image_patches(Tensor[] images, Tensor[] axes, Tensor table, int patch, int merge, int frames) -> Tensor[]");
  m.impl("image_patches", c10::DispatchKey::CPU, TORCH_FN(image_patches));
}
