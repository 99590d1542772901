// Pairs of feature maps from tensors: the part of the glue that both devices share.
#pragma once

#include "check.h"
#include "fsp.h"

namespace kdfast {

// A pair as places in a list of features, and its Gram matrix's sizes.
struct GramPair {
  int64_t first, second;
  Grid grid[2];

  int64_t channels(int side) const { return grid[side].feature.channels; }
};

inline Grid grid_of(const DenseFeature& feature, int64_t height, int64_t width) {
  return {feature.view, width, height * width, feature.tensor.size(2) / height,
          feature.tensor.size(3) / width};
}

inline GramPair gram_pair(const char* op, const DenseFeature& first, const DenseFeature& second) {
  const int64_t height = second.tensor.size(2), width = second.tensor.size(3);
  KD_CHECK(first.view.samples == second.view.samples, op, ": expected one batch size");
  KD_CHECK(first.tensor.size(2) % height == 0 && first.tensor.size(3) % width == 0, op,
           ": expected the second feature's height and width to divide the first's");
  KD_CHECK((first.view.storage == Storage::kDouble) == (second.view.storage == Storage::kDouble),
           op, ": expected float64 for all features or none");
  return {0, 1, {grid_of(first, height, width), grid_of(second, height, width)}};
}

inline std::vector<GramPair> gram_pairs(const char* op, const std::vector<DenseFeature>& features,
                                        const std::vector<int64_t>& places) {
  KD_CHECK(!places.empty() && places.size() % 2 == 0, op, ": expected pairs, at least one");
  const int64_t count = int64_t(features.size());
  std::vector<GramPair> pairs;
  for (size_t i = 0; i < places.size(); i += 2) {
    const int64_t first = places[i], second = places[i + 1];
    KD_CHECK(first >= 0 && first < count && second >= 0 && second < count, op,
             ": expected places below ", count, " in pair ", i / 2);
    KD_CHECK(features[first].view.samples == features[0].view.samples, op,
             ": expected one batch size in pair ", i / 2);
    pairs.push_back(gram_pair(op, features[first], features[second]));
    pairs.back().first = first;
    pairs.back().second = second;
  }
  return pairs;
}

// Pairs of both networks: equal channels, one batch, all or none float64.
inline void check_networks(const char* op, const std::vector<GramPair>& students,
                           const std::vector<GramPair>& teachers) {
  for (size_t i = 0; i < students.size(); ++i) {
    for (int side : {0, 1}) {
      const Feature& s = students[i].grid[side].feature;
      const Feature& t = teachers[i].grid[side].feature;
      KD_CHECK(s.channels == t.channels, op, ": expected equal channels in pair ", i);
      KD_CHECK(s.samples == t.samples, op, ": expected one batch size in pair ", i);
      KD_CHECK((s.storage == Storage::kDouble) == (t.storage == Storage::kDouble), op,
               ": expected float64 for all features or none, pair ", i);
    }
  }
}

// Places of the features whose gradients are asked for.
inline void check_wanted(const char* op, const std::vector<int64_t>& wanted,
                         const std::vector<DenseFeature>& features) {
  KD_CHECK(wanted.size() <= features.size(), op, ": expected a place once");
  for (int64_t place : wanted) {
    KD_CHECK(place >= 0 && place < int64_t(features.size()), op, ": no feature ", place);
  }
}

// Gram matrices, or gradients with respect to them: [samples, channels, channels], dense, in the
// accumulation type.
inline void check_matrix(const char* op, const Tensor& matrix, const GramPair& pair) {
  const Feature& first = pair.grid[0].feature;
  KD_CHECK(matrix.dim() == 3 && matrix.size(0) == first.samples &&
               matrix.size(1) == pair.channels(0) && matrix.size(2) == pair.channels(1) &&
               matrix.is_contiguous(),
           op, ": expected a dense Gram matrix of the pair");
  KD_CHECK((matrix.scalar_type() == ScalarType::Double) == (first.storage == Storage::kDouble), op,
           ": expected a Gram matrix in the accumulation type");
}

}  // namespace kdfast
