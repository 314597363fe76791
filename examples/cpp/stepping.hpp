// Stepping an ONNX export (`stepping export RUN --format onnx`) with onnxruntime.
//
//   stepping::Model model(env, "export-onnx");
//   auto session = model.start(images, batch);  // float (batch, C, H, W); subnet 1: session.logits()
//   session.step();                             // subnet 2, for the price of the difference
//   model.predict(images, batch, {{"max_prob", 0.9}}, 0.02);
//
// The same manifest, rules and names as those of stepping_plugin.runtimes.ort for Python.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace stepping {

using Shape = std::vector<int64_t>;
using Rules = std::map<std::string, double>;  // max_prob, margin, entropy: any of them stops a sample
constexpr double FOREVER = std::numeric_limits<double>::infinity();

inline double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Measured times of every step at every batch size; guarantees: stepping_plugin/runtimes/clock.py.
class Clock {
 public:
  explicit Clock(std::vector<double> macs) : macs_(std::move(macs)) {}

  void record(size_t level, size_t batch, double seconds) {
    auto& known = records_[{level, batch}];
    const double usual = known.times.empty() ? seconds : quantile(known.times, 0.5);
    if (known.trial) known.times.clear();
    known.times.push_back(seconds);
    if (known.times.size() > WINDOW) known.times.erase(known.times.begin());
    known.trial = false;
    known.refused = 0;
    if (known.times.size() == WINDOW) known.patience = FIRST;
    slowdown_ = usual > 0 ? seconds / usual : 1;
  }

  // Whether a step may run with `left` seconds to go: it will probably end in time, or it is tried.
  bool allows(size_t level, size_t batch, double left, size_t last) {
    if (left <= 0) return false;
    if (usual(level, batch, last) * std::max(1.0, slowdown_) <= left) return true;
    auto& known = records_[{level, batch}];
    if (known.refused < known.patience) {
      for (size_t missed = level; missed <= macs_.size(); ++missed) ++records_[{missed, batch}].refused;
      return false;
    }
    known.refused = 0;
    known.trial = true;
    known.patience = std::min(2 * known.patience, MOST);
    return true;
  }

 private:
  static constexpr size_t WINDOW = 24;
  static constexpr int FIRST = 16, MOST = 256;
  struct Record {
    std::vector<double> times;
    int refused = 0, patience = FIRST;
    bool trial = false;
  };

  static double quantile(std::vector<double> values, double share) {
    std::sort(values.begin(), values.end());
    return values[std::min(values.size() - 1, static_cast<size_t>(share * values.size()))];
  }

  std::map<size_t, double> measured(size_t level) const {
    std::map<size_t, double> found;
    for (const auto& [key, known] : records_)
      if (key.first == level && !known.times.empty()) found[key.second] = quantile(known.times, 0.9);
    return found;
  }

  double usual(size_t level, size_t batch, size_t last) const {
    const auto own = measured(level);
    double most = 0;
    if (!own.empty()) {
      if (own.count(batch)) return own.at(batch);
      double least = FOREVER;
      for (const auto& [size, seconds] : own)
        if (size >= batch) least = std::min(least, seconds);
      for (const auto& [size, seconds] : own) most = std::max(most, seconds * batch / size);
      return least < FOREVER ? least : most;
    }
    const double share = macs_[level - 1] / std::max(1.0, macs_[last - 1]);
    for (const auto& [size, seconds] : measured(last))
      most = std::max(most, seconds * std::max(1.0, double(batch) / size) * share);
    return 2 * most;
  }

  std::vector<double> macs_;
  std::map<std::pair<size_t, size_t>, Record> records_;
  double slowdown_ = 1;
};

inline bool stops(const float* scores, size_t classes, const Rules& until) {
  const double top = *std::max_element(scores, scores + classes);
  std::vector<double> shares(classes);
  std::transform(scores, scores + classes, shares.begin(), [top](float s) { return std::exp(s - top); });
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  double first = 0, second = 0, entropy = 0;
  for (double& share : shares) {
    share /= sum;
    if (share > 0) entropy -= share * std::log(share);
    second = std::max(second, std::min(first, share));
    first = std::max(first, share);
  }
  const Rules measured{{"max_prob", first}, {"margin", first - second}, {"entropy", -entropy}};
  return std::any_of(until.begin(), until.end(), [&](const auto& rule) {
    return measured.at(rule.first) >= (rule.first == "entropy" ? -rule.second : rule.second);
  });
}

class Model;

// What one batch of images has computed so far.
class Session {
 public:
  const float* logits() const { return caches_.at("scores").GetTensorData<float>(); }  // (batch, classes)
  size_t classes() const { return caches_.at("scores").GetTensorTypeAndShapeInfo().GetElementCount() / batch_; }
  size_t batch() const { return batch_; }
  size_t subnet() const { return subnet_; }
  double macs() const;
  void step();                               // run the next subnet's new units
  void keep(const std::vector<bool>& mask);  // go on with some samples only

 private:
  friend class Model;
  Session(Model& model, Ort::Value images, size_t batch) : model_(model), batch_(batch) {
    caches_.emplace("image", std::move(images));
    step();
  }

  Model& model_;
  std::map<std::string, Ort::Value> caches_;
  size_t batch_, subnet_ = 0;
};

struct Prediction {
  std::vector<std::vector<float>> logits;  // per sample
  std::vector<size_t> subnet;
  std::vector<double> macs;
  double seconds;
  bool in_time;
};

// The steps of an export, ready to run. Not for several threads at once: each takes its own.
class Model {
 public:
  Model(Ort::Env& env, const std::string& folder, const Ort::SessionOptions& options = Ort::SessionOptions{})
      : manifest(nlohmann::json::parse(std::ifstream(folder + "/manifest.json"))), clock(step_macs(manifest)) {
    if (manifest.at("format") != "stepping-plugin onnx export" || manifest.at("version") != 1)
      throw std::runtime_error(folder + ": not an ONNX export of version 1");
    for (const auto& step : manifest.at("steps")) {
      sessions.emplace_back(env, (folder + "/" + step.at("file").get<std::string>()).c_str(), options);
      for (const char* side : {"inputs", "outputs"})
        for (const auto& entry : step.at(side)) places[entry.at("cache")] = entry;
    }
  }

  size_t num_subnets() const { return sessions.size(); }

  // Run subnet 1. The images must stay as they are until the last step.
  Session start(std::vector<float>& images, size_t batch) {
    Shape shape{static_cast<int64_t>(batch)};
    for (int64_t size : manifest.at("image_size")) shape.push_back(size);
    const auto numbers = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
    if (!batch || static_cast<size_t>(numbers) != images.size()) throw std::runtime_error("images of another size");
    const auto& fixed = manifest.at("batch");
    if (fixed != "dynamic" && fixed != batch) throw std::runtime_error("the export has another batch size");
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), shape.size());
    return Session(*this, std::move(tensor), batch);
  }

  // Step until a rule says stop, for each sample on its own, or until `deadline` seconds are over.
  Prediction predict(std::vector<float>& images, size_t batch, const Rules& until = {}, double deadline = FOREVER) {
    const double began = now();
    Session session = start(images, batch);
    Prediction result{std::vector<std::vector<float>>(batch), std::vector<size_t>(batch, 1), {}, 0, true};
    std::vector<size_t> active(batch);
    std::iota(active.begin(), active.end(), size_t{0});
    const auto take = [&] {
      for (size_t k = 0; k < active.size(); ++k) {
        const float* scores = session.logits() + k * session.classes();
        result.logits[active[k]].assign(scores, scores + session.classes());
        result.subnet[active[k]] = session.subnet();
      }
    };
    take();
    while (session.subnet() < num_subnets()) {
      std::vector<bool> going;
      std::vector<size_t> left_over;
      for (size_t k = 0; k < active.size(); ++k) {
        going.push_back(!stops(session.logits() + k * session.classes(), session.classes(), until));
        if (going.back()) left_over.push_back(active[k]);
      }
      if (left_over.empty()) break;
      session.keep(going);
      active = left_over;
      if (!clock.allows(session.subnet() + 1, active.size(), deadline - (now() - began), session.subnet())) break;
      session.step();
      take();
    }
    for (size_t subnet : result.subnet) result.macs.push_back(manifest.at("macs").at(subnet - 1));
    result.seconds = now() - began;
    result.in_time = result.seconds <= deadline;
    return result;
  }

  nlohmann::json manifest;
  std::vector<Ort::Session> sessions;
  std::map<std::string, nlohmann::json> places;
  Clock clock;

 private:
  static std::vector<double> step_macs(const nlohmann::json& manifest) {
    std::vector<double> macs;
    for (const auto& step : manifest.at("steps")) macs.push_back(step.at("macs"));
    return macs;
  }
};

inline double Session::macs() const { return model_.manifest.at("macs").at(subnet_ - 1); }

inline void Session::step() {
  if (subnet_ == model_.num_subnets()) throw std::runtime_error("the last subnet has run");
  const double began = now();
  const auto& step = model_.manifest.at("steps").at(subnet_);
  auto& session = model_.sessions[subnet_];
  Ort::IoBinding binding(session);  // takes inputs and gives outputs without copying them
  for (const auto& entry : step.at("inputs"))
    binding.BindInput(entry.at("name").get<std::string>().c_str(), caches_.at(entry.at("cache")));
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  for (const auto& entry : step.at("outputs"))
    binding.BindOutput(entry.at("name").get<std::string>().c_str(), memory);
  session.Run(Ort::RunOptions{}, binding);
  auto results = binding.GetOutputValues();
  for (size_t k = 0; k < results.size(); ++k)
    caches_.insert_or_assign(step.at("outputs").at(k).at("cache").get<std::string>(), std::move(results[k]));
  for (const auto& name : step.at("drop")) caches_.erase(name.get<std::string>());
  model_.clock.record(++subnet_, batch_, now() - began);
}

inline void Session::keep(const std::vector<bool>& mask) {
  std::vector<size_t> kept;
  for (size_t k = 0; k < mask.size(); ++k)
    if (mask[k]) kept.push_back(k);
  if (mask.size() != batch_ || kept.empty()) throw std::runtime_error("keep: one truth per sample, one of them true");
  if (kept.size() == batch_) return;
  Ort::AllocatorWithDefaultOptions allocator;
  for (auto& [name, cache] : caches_) {
    const auto& place = model_.places.at(name);
    if (!place.contains("axis")) continue;
    const auto info = cache.GetTensorTypeAndShapeInfo();
    const auto old = info.GetShape();
    const size_t axis = place.at("axis"), outer = place.value("outer", 1);
    size_t blocks = outer, size = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4;
    for (size_t d = 0; d < axis; ++d) blocks *= old[d];
    for (size_t d = axis + 1; d < old.size(); ++d) size *= old[d];
    size *= old[axis] / (outer * batch_);  // bytes of one sample that lie together
    auto shape = old;
    shape[axis] = old[axis] / batch_ * kept.size();
    auto picked = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), info.GetElementType());
    const char* from = cache.GetTensorData<char>();
    char* to = picked.GetTensorMutableData<char>();
    for (size_t block = 0; block < blocks; ++block)  // sample b has the rows (o * batch + b) * inner + i of the axis
      for (size_t sample : kept) to = std::copy_n(from + (block * batch_ + sample) * size, size, to);
    cache = std::move(picked);
  }
  batch_ = kept.size();
}

}  // namespace stepping
