// What a round must do, recomputed from all ranks' inputs with none of the library's code but its types.
//
// Dispatch. Rank r's token goes to every rank that owns at least one of its experts. An owner gets its rows
// in (source rank, token) order, byte for byte. per_token: with all ids and weights of the token. per_expert:
// each of the owner's experts has its rows in that order; a token that names an expert twice has one row
// there.
//
// Combine. The partial of an owner for a token is its row (per_token), or the sum over the token's slots that
// name its experts, in slot order (per_slot, per_expert), times the slot's weight unless weights are applied.
// The sum of a remote node is the sum of its owners' partials in rank order. The result is the sum over nodes
// in order: of a remote node its sum, of the own node each owner's partial in rank order. Each of the three
// sums is made in float32 and rounded once to the combine type; a single term is a copy; no term is zero.
#pragma once

#include <functional>
#include <limits>
#include <map>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "protocol/layout.h"
#include "proxy/signal_policy.h"
#include "scalar_oracle.h"
#include "test_memory.h"

namespace efa_ep {

/// What a buffer holds where nothing may be written.
inline constexpr std::byte kUntouched{0x5C};

enum class Routing { kMixed, kUniform, kDistinct, kSparse, kRepeated, kOneExpert, kAllDropped, kNoTokens };

struct WorldConfig {
  Layout layout;
  std::vector<uint32_t> expert_owner;
  ScalarType combine_type = ScalarType::kBfloat16;
  bool per_expert = false;
  bool per_slot = false;
  bool weights_applied = true;
  bool ids_are_64_bit = false;
  bool in_place = false;  ///< activations, and results per token, are produced where the device wants them
  size_t cached_bytes = std::numeric_limits<size_t>::max();
  Routing routing = Routing::kMixed;
  uint32_t rounds = 3;
  uint64_t chunk_bytes = 128;
  uint32_t rails = 1;
  uint32_t ring_commands = 4096;
  uint32_t send_queue_depth = 16;
  uint32_t arrival_room = 4096;  // of a completion queue
  bool proxy_threads = true;
  bool thread_per_channel = false;
  SignalPolicyKind signal_policy = SignalPolicyKind::kCounted;
  uint64_t seed = 1;

  uint32_t world() const { return layout.topology.world; }
  size_t experts() const { return expert_owner.size(); }
};

std::ostream& operator<<(std::ostream& out, const WorldConfig& c);

/// One rank's part of one round: what goes in, and what must come out.
struct RankRound {
  uint32_t tokens = 0;
  std::vector<int64_t> ids;    // [tokens][top_k]
  std::vector<float> weights;  // [tokens][top_k]
  Bytes x, scales;             // [tokens]

  uint32_t rows = 0;
  Bytes received_x, received_scales;  // [rows] or [experts][capacity]
  std::vector<int32_t> received_ids;  // [rows][top_k], none in the per_expert layout
  std::vector<float> received_weights;
  std::vector<int32_t> tokens_per_expert;

  Bytes expert_rows;  // what this rank's experts answer, in the layout that combine_send takes
  Bytes out;          // [tokens]

  uint64_t network_rows = 0, peer_rows = 0;
};

class Planner {
 public:
  explicit Planner(const WorldConfig& config)
      : config_(config), layout_(config.layout), topology_(layout_.topology), random_(config.seed) {}

  using Change = std::function<void(uint32_t rank, RankRound& round)>;

  /// A round of all ranks, with random inputs that `change` may replace.
  std::vector<RankRound> plan(const Change& change = nullptr);

 private:
  using Token = std::pair<uint32_t, uint32_t>;  // source rank, token

  uint32_t below(uint64_t bound) { return static_cast<uint32_t>(random_() % bound); }
  uint32_t owner_of(int64_t id) const { return config_.expert_owner.at(static_cast<size_t>(id)); }
  uint32_t node_of(uint32_t rank) const { return rank / topology_.ranks_per_node; }
  uint32_t index_of(uint32_t rank) const { return rank % topology_.ranks_per_node; }
  size_t elements() const { return layout_.row.combine_bytes / scalar_bytes(config_.combine_type); }
  int64_t id_of(const Token& token, uint32_t slot) const;
  bool owned_by(uint32_t owner, int64_t id) const { return id >= 0 && owner_of(id) == owner; }
  bool goes_to(const Token& token, uint32_t owner) const;
  size_t local_index(int64_t id) const;

  void draw_tokens(RankRound& rank);
  Bytes random_bytes(size_t count);
  /// Finite numbers that the combine type holds, of magnitudes close enough for sums to round; some are
  /// zeros.
  oracle::Row random_row();
  /// Stores a row that must be read, at a place of the expert rows.
  oracle::Row answer(RankRound& rank, size_t place);

  void plan_owner(uint32_t owner);
  void plan_token_row(uint32_t owner, const Token& token, size_t row);
  void plan_expert_row(uint32_t owner, const Token& token, size_t capacity);
  void receive(RankRound& rank, const Token& token, size_t place) const;
  void plan_result(uint32_t rank);

  /// Tokens of `source` that go to at least one rank of `node`.
  uint64_t tokens_to_node(uint32_t source, uint32_t node) const;
  uint64_t rows_from(uint32_t owner, uint32_t source) const;
  void count_rows(uint32_t rank);

  const WorldConfig& config_;
  const Layout& layout_;
  const Topology topology_;
  std::mt19937_64 random_;
  std::vector<RankRound> ranks_;
  std::vector<std::vector<Token>> rows_;                // by owner
  std::vector<std::map<Token, oracle::Row>> partials_;  // by owner
};

/// Fails the test if they differ, and says in which row first.
void expect_rows(const std::string& name, const Bytes& got, const Bytes& want, size_t row_bytes);

}  // namespace efa_ep
