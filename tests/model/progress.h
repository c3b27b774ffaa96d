// States of a search: how far every step has come, and a compact set of such states.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace efa_ep::model {

/// How many rounds every step has done, two bits each.
class Progress {
 public:
  static constexpr int kMost = 3;

  explicit Progress(size_t steps) : words_((steps + kPerWord - 1) / kPerWord, 0), steps_(steps) {}

  size_t size() const { return steps_; }
  int operator[](size_t step) const {
    return static_cast<int>(words_[step / kPerWord] >> (step % kPerWord * 2) & 3);
  }
  /// One round more; the step has done less than kMost.
  void advance(size_t step) { words_[step / kPerWord] += uint64_t{1} << (step % kPerWord * 2); }

  /// Forgets rounds that every step has done. Returns how many.
  uint32_t lower() {
    uint32_t rounds = 0;
    for (; every_step_advanced(); ++rounds) {
      for (size_t i = 0; i < words_.size(); ++i) words_[i] -= one_round(i);
    }
    return rounds;
  }

  std::vector<uint64_t>& words() { return words_; }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  static constexpr size_t kPerWord = 32;

  /// Word i of the state in which every step has done one round.
  uint64_t one_round(size_t i) const {
    const size_t used = std::min(kPerWord, steps_ - i * kPerWord);
    return uint64_t{0x5555555555555555} >> (kPerWord - used) * 2;
  }
  bool every_step_advanced() const {
    for (size_t i = 0; i < words_.size(); ++i) {
      if (((words_[i] | words_[i] >> 1) & one_round(i)) != one_round(i)) return false;
    }
    return true;
  }

  std::vector<uint64_t> words_;
  size_t steps_;
};

/// A set of states, numbered in the order of their insertion, with the step that led to each.
class StateSet {
 public:
  static constexpr uint32_t kNoParent = ~uint32_t{0};

  explicit StateSet(const Progress& first) : words_(first.words().size()), table_(1024, kEmpty) {
    insert(first, kNoParent, 0);
  }

  size_t size() const { return parents_.size(); }
  uint32_t parent(size_t state) const { return parents_[state]; }
  uint32_t step(size_t state) const { return steps_[state]; }
  void read(size_t state, Progress& progress) const {
    std::copy_n(&packed_[state * words_], words_, progress.words().begin());
  }

  /// Does nothing if the state is there already.
  void insert(const Progress& progress, uint32_t parent, uint32_t step) {
    const uint64_t* words = progress.words().data();
    size_t place = hash(words) & (table_.size() - 1);
    for (; table_[place] != kEmpty; place = (place + 1) & (table_.size() - 1)) {
      if (std::equal(words, words + words_, &packed_[table_[place] * words_])) return;
    }
    table_[place] = static_cast<uint32_t>(size());
    packed_.insert(packed_.end(), words, words + words_);
    parents_.push_back(parent);
    steps_.push_back(step);
    if (size() * 2 > table_.size()) grow();
  }

 private:
  static constexpr uint32_t kEmpty = ~uint32_t{0};

  size_t hash(const uint64_t* words) const {
    uint64_t value = 0;
    for (size_t i = 0; i < words_; ++i) {
      value = (value ^ words[i]) * 0x9E3779B97F4A7C15;
      value ^= value >> 29;
    }
    return value;
  }
  void grow() {
    table_.assign(table_.size() * 2, kEmpty);
    for (size_t state = 0; state < size(); ++state) {
      size_t place = hash(&packed_[state * words_]) & (table_.size() - 1);
      while (table_[place] != kEmpty) place = (place + 1) & (table_.size() - 1);
      table_[place] = static_cast<uint32_t>(state);
    }
  }

  const size_t words_;
  std::vector<uint64_t> packed_;
  std::vector<uint32_t> table_;  // open addressing: number of a state, or kEmpty
  std::vector<uint32_t> parents_;
  std::vector<uint32_t> steps_;
};

}  // namespace efa_ep::model
