// Glue of the attention kernels: checks, outputs, launch tables.
#include <algorithm>

#include "check.h"
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

int64_t blocks_of(const Feature& feature) {
  return feature.samples * tiles_of(feature.positions);
}

std::tuple<Tensor, Tensor> attention_map(Tensor feature, double power) {
  const CurrentDevice device(feature);
  const DenseFeature dense("attention_map", feature);
  const Feature& view = dense.view;
  const ScalarType type = accumulate_type(feature);
  const int64_t blocks = blocks_of(view);
  Tensor map = empty_on(feature, {view.samples, view.positions}, type);
  Tensor norm = empty_on(feature, {view.samples}, type);
  Tensor tile_products = empty_on(feature, {blocks, 3}, ScalarType::Double);
  with_accumulator(feature, [&](auto zero) {
    using A = decltype(zero);
    MapTable<A> table{};
    table.count = 1;
    table.task[0] = {{view, {}}, map.mutable_data_ptr<A>(), 0, view.positions, 1};
    double* products = tile_products.mutable_data_ptr<double>();
    with_power(power, [&](auto p) {
      launch(attention_maps<A, p.value>, blocks, kThreads, kMapsShared<A>, device.stream, table,
             A(power), products);
    });
    launch(attention_map_normalise<A>, view.samples, kThreads, 0, device.stream,
           map.mutable_data_ptr<A>(), norm.mutable_data_ptr<A>(), products, view.positions);
  });
  return {map, norm};
}

Tensor attention_map_backward(Tensor grad, Tensor feature, Tensor map, Tensor norm, double power) {
  const CurrentDevice device(feature);
  const DenseFeature dense("attention_map_backward", feature);
  const Feature& view = dense.view;
  const Tensor dense_grad = torch::stable::contiguous(grad);
  Tensor gradient = empty_gradient(dense);
  with_accumulator(feature, [&](auto zero) {
    using A = decltype(zero);
    with_power(power, [&](auto p) {
      launch(attention_map_gradient<A, p.value>, blocks_of(view), kThreads, kSlopesShared<A>,
             device.stream, view, A(power), dense_grad.const_data_ptr<A>(),
             map.const_data_ptr<A>(), norm.const_data_ptr<A>(), gradient.mutable_data_ptr());
    });
  });
  return gradient;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> attention_loss(std::vector<Tensor> student,
                                                               std::vector<Tensor> teacher,
                                                               double power) {
  const std::vector<DenseFeature> students = dense_features("attention_loss", student);
  const std::vector<DenseFeature> teachers = dense_features("attention_loss", teacher);
  check_pairs("attention_loss", students, teachers);
  const CurrentDevice device(student[0]);
  const int64_t pairs = int64_t(students.size()), samples = students[0].view.samples;

  const ScalarType type = accumulate_type(student[0]);
  Tensor loss = empty_on(student[0], {}, type);
  Tensor products = empty_on(student[0], {pairs, samples, 3}, ScalarType::Double);
  std::vector<Tensor> maps;
  for (const DenseFeature& s : students) {
    maps.push_back(empty_on(student[0], {2, samples, s.view.positions}, type));
  }
  with_accumulator(student[0], [&](auto zero) {
    using A = decltype(zero);
    for (int64_t first = 0; first < pairs; first += kMaxPairs) {
      MapTable<A> table{};
      table.count = int(std::min<int64_t>(kMaxPairs, pairs - first));
      int64_t blocks = 0;
      for (int i = 0; i < table.count; ++i) {
        const Feature& s = students[first + i].view;
        table.task[i] = {{s, teachers[first + i].view},
                         maps[first + i].mutable_data_ptr<A>(),
                         blocks,
                         s.positions,
                         2};
        blocks += blocks_of(s);
      }
      Tensor tile_products = empty_on(student[0], {blocks, 3}, ScalarType::Double);
      double* tiles = tile_products.mutable_data_ptr<double>();
      with_power(power, [&](auto p) {
        launch(attention_maps<A, p.value>, blocks, kThreads, kMapsShared<A>, device.stream, table,
               A(power), tiles);
      });
      launch(attention_loss_sum<A>, 1, kSumThreads, 0, device.stream, table, tiles,
             products.mutable_data_ptr<double>() + 3 * first * samples,
             loss.mutable_data_ptr<A>(), first > 0);
    }
  });
  return {loss, maps, products};
}

std::vector<Tensor> attention_loss_backward(Tensor grad, std::vector<Tensor> features,
                                            std::vector<Tensor> maps, Tensor products,
                                            double power, std::vector<int64_t> slots) {
  const CurrentDevice device(grad);
  const std::vector<DenseFeature> dense = dense_features("attention_loss_backward", features);
  const int64_t count = int64_t(dense.size());
  std::vector<Tensor> gradients;
  for (const DenseFeature& feature : dense) gradients.push_back(empty_gradient(feature));
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    for (int64_t first = 0; first < count; first += kMaxPairs) {
      SlopeTable<A> table{};
      table.count = int(std::min<int64_t>(kMaxPairs, count - first));
      int64_t blocks = 0;
      for (int i = 0; i < table.count; ++i) {
        const Feature& view = dense[first + i].view;
        const int64_t pair = slots[first + i] / 2, side = slots[first + i] % 2;
        const int64_t size = view.samples * view.positions;
        const A* map = maps[pair].const_data_ptr<A>();
        table.task[i] = {view,
                         gradients[first + i].mutable_data_ptr(),
                         map + side * size,
                         map + (1 - side) * size,
                         products.const_data_ptr<double>() + 3 * pair * view.samples,
                         blocks,
                         view.positions,
                         int(side)};
        blocks += blocks_of(view);
      }
      with_power(power, [&](auto p) {
        launch(attention_loss_gradient<A, p.value>, blocks, kThreads, kSlopesShared<A>,
               device.stream, table, A(power), grad.const_data_ptr<A>());
      });
    }
  });
  return gradients;
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("attention_map", TORCH_BOX(&attention_map));
  m.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
  m.impl("attention_loss", TORCH_BOX(&attention_loss));
  m.impl("attention_loss_backward", TORCH_BOX(&attention_loss_backward));
}

}  // namespace kdfast::cuda
