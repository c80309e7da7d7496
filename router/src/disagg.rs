//! Whether a prompt is computed where it will be decoded, or by a prefill worker.

/// Conditional disaggregation: a prompt goes to a prefill worker when it is worth the hand-off and
/// a prefill worker can start soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisaggPolicy {
    /// Use prefill workers at all. Default: true.
    pub enabled: bool,
    /// A prompt with at most this many tokens that the decode worker lacks is computed there.
    /// Default: 64, four blocks of 16: about a decode step's worth of work, less than a hand-off.
    /// Dynamo's conditional policy bounds it at 2048, for GPUs; 0 sends all prompts away.
    pub local_prefill_tokens_max: u32,
    /// A prefill rank with at least this many requests is full. Default: 16.
    pub prefill_requests_max: u32,
    /// Prefill ranks that are proposed to the decode worker, best first. Default: 3.
    pub hints_max: usize,
}

/// What the policy looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisaggInput {
    /// Prompt tokens that the chosen decode rank lacks.
    pub uncached_tokens: u32,
    /// Prefill ranks that may be used.
    pub prefill_ranks: usize,
    /// Requests on the one that has the fewest.
    pub prefill_requests_min: u32,
}

/// Where the prompt is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillChoice {
    /// On the decode rank.
    Local(LocalReason),
    /// On a prefill rank.
    Remote,
}

/// Why a prompt is computed where it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalReason {
    /// The chosen worker is an aggregated one.
    Aggregated,
    /// The policy is off.
    Disabled,
    /// No prefill worker is there.
    NoPrefillWorker,
    /// Too little is left to compute.
    Short,
    /// Every prefill rank is full.
    QueueFull,
}

impl DisaggPolicy {
    /// Decides for one request.
    #[must_use]
    pub const fn decide(&self, input: &DisaggInput) -> PrefillChoice {
        if !self.enabled {
            PrefillChoice::Local(LocalReason::Disabled)
        } else if input.prefill_ranks == 0 {
            PrefillChoice::Local(LocalReason::NoPrefillWorker)
        } else if input.uncached_tokens <= self.local_prefill_tokens_max {
            PrefillChoice::Local(LocalReason::Short)
        } else if input.prefill_requests_min >= self.prefill_requests_max {
            PrefillChoice::Local(LocalReason::QueueFull)
        } else {
            PrefillChoice::Remote
        }
    }
}

impl LocalReason {
    /// A short name, for metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Aggregated => "aggregated",
            Self::Disabled => "disabled",
            Self::NoPrefillWorker => "no_prefill_worker",
            Self::Short => "short",
            Self::QueueFull => "queue_full",
        }
    }
}

impl Default for DisaggPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            local_prefill_tokens_max: 64,
            prefill_requests_max: 16,
            hints_max: 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_needs_a_long_prompt_and_a_prefill_rank_with_room() {
        let policy = DisaggPolicy::default();
        let input = DisaggInput {
            uncached_tokens: 65,
            prefill_ranks: 1,
            prefill_requests_min: 15,
        };
        assert_eq!(policy.decide(&input), PrefillChoice::Remote);
        for (input, reason) in [
            (
                DisaggInput {
                    uncached_tokens: 64,
                    ..input
                },
                LocalReason::Short,
            ),
            (
                DisaggInput {
                    prefill_requests_min: 16,
                    ..input
                },
                LocalReason::QueueFull,
            ),
            (
                DisaggInput {
                    prefill_ranks: 0,
                    ..input
                },
                LocalReason::NoPrefillWorker,
            ),
        ] {
            assert_eq!(policy.decide(&input), PrefillChoice::Local(reason));
        }
        let off = DisaggPolicy {
            enabled: false,
            ..policy
        };
        assert_eq!(
            off.decide(&input),
            PrefillChoice::Local(LocalReason::Disabled)
        );
    }
}
