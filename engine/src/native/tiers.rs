//! kvbm's tiers below a rank's pool.

use std::{fmt, time::Duration};

use blockplane_kvbm::{
    ImmutableBlock, TierMatch,
    tier::{OnboardTicket, Onboarded, RankTiers},
};
use blockplane_protocol::{BlockId, TokenBlock};
use blockplane_transfer::Agent;

use super::{
    below::{Below, Loaded, LoadedFrom, Loading, Lower},
    pool::KvPool,
};
use crate::scheduler::Found;

/// The tiers below one rank.
#[derive(Debug)]
pub(crate) struct ManagedTiers {
    tiers: RankTiers,
    /// The pool is reached through it: the tiers lose the rank when it is gone.
    _agent: Agent,
}

/// What was found in them for one sequence.
struct Match {
    tiers: RankTiers,
    found: TierMatch,
}

impl ManagedTiers {
    /// `agent` is the one that registered the rank's pool.
    pub(crate) const fn new(tiers: RankTiers, agent: Agent) -> Self {
        Self {
            tiers,
            _agent: agent,
        }
    }
}

impl Below for ManagedTiers {
    fn extend_prefix(&self, prefix: Vec<ImmutableBlock>, blocks: &[TokenBlock]) -> Found<KvPool> {
        let mut found = self.tiers.extend(prefix, blocks);
        let readable = found.take_device();
        let lower = (found.lower() > 0).then(|| {
            Box::new(Match {
                tiers: self.tiers.clone(),
                found,
            }) as Box<dyn Lower>
        });
        Found {
            blocks: readable,
            lower,
        }
    }

    fn referenced(&self, blocks: &[TokenBlock]) {
        self.tiers.referenced(blocks);
    }

    fn offload(&self, blocks: &[TokenBlock], priority: Option<u32>) -> bool {
        self.tiers.offload(blocks, priority)
    }
}

impl Lower for Match {
    fn load(
        self: Box<Self>,
        targets: Vec<BlockId>,
        within: Duration,
        done: Box<dyn FnOnce(Loaded) + Send>,
    ) -> Box<dyn Loading> {
        let Self { tiers, found } = *self;
        let ticket = tiers.onboard(
            found,
            targets,
            within,
            Box::new(move |onboarded: Onboarded| {
                let from = onboarded.from;
                done(Loaded {
                    leading: onboarded.loaded,
                    from: LoadedFrom {
                        host: from.host,
                        disk: from.disk,
                        remote: from.remote,
                    },
                });
            }),
        );
        Box::new(ticket)
    }
}

impl Loading for OnboardTicket {
    fn give_up(self: Box<Self>, keep: Box<dyn Send>) {
        Self::give_up(*self, keep);
    }
}

impl fmt::Debug for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Match").field(&self.found).finish()
    }
}
