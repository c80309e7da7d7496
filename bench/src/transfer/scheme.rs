//! Who transfers to whom.

use anyhow::{bail, ensure};

/// Which initiators post to which targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scheme {
    /// The i-th initiator to the i-th target.
    Pairwise,
    /// All initiators to one target.
    ManyToOne,
    /// One initiator to all targets.
    OneToMany,
    /// Every initiator to every target.
    AllToAll,
}

/// Most processes of one kind.
const SIDES_MAX: usize = 64;

/// A scheme with its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Topology {
    pub(super) scheme: Scheme,
    pub(super) initiators: usize,
    pub(super) targets: usize,
    /// The i-th initiator leaves out the i-th target, which lives at the same place.
    pub(super) skip_own: bool,
}

impl Scheme {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Pairwise => "pairwise",
            Self::ManyToOne => "many-to-one",
            Self::OneToMany => "one-to-many",
            Self::AllToAll => "all-to-all",
        }
    }
}

impl Topology {
    /// Fills in the numbers that were not given and checks them.
    pub(super) fn new(
        scheme: Scheme,
        initiators: Option<usize>,
        targets: Option<usize>,
    ) -> anyhow::Result<Self> {
        let (initiators, targets) = match scheme {
            Scheme::Pairwise => {
                let number = initiators.or(targets).unwrap_or(1);
                (number, targets.unwrap_or(number))
            }
            Scheme::ManyToOne => (initiators.unwrap_or(2), targets.unwrap_or(1)),
            Scheme::OneToMany => (initiators.unwrap_or(1), targets.unwrap_or(2)),
            Scheme::AllToAll => {
                let number = initiators.or(targets).unwrap_or(2);
                (initiators.unwrap_or(number), targets.unwrap_or(number))
            }
        };
        for (option, number) in [("--initiators", initiators), ("--targets", targets)] {
            ensure!(
                (1..=SIDES_MAX).contains(&number),
                "{option} is {number}; accepted: 1 to {SIDES_MAX}"
            );
        }
        match scheme {
            Scheme::Pairwise if initiators != targets => bail!(
                "--scheme pairwise needs as many --targets ({targets}) as --initiators \
                 ({initiators})"
            ),
            Scheme::ManyToOne if targets != 1 => {
                bail!("--scheme many-to-one has one target; --targets is {targets}")
            }
            Scheme::OneToMany if initiators != 1 => {
                bail!("--scheme one-to-many has one initiator; --initiators is {initiators}")
            }
            Scheme::Pairwise | Scheme::ManyToOne | Scheme::OneToMany | Scheme::AllToAll => {}
        }
        Ok(Self {
            scheme,
            initiators,
            targets,
            skip_own: false,
        })
    }

    /// `places` initiators and targets, each initiator posting to the targets of all other places.
    pub(super) const fn between(places: usize) -> Self {
        Self {
            scheme: Scheme::AllToAll,
            initiators: places,
            targets: places,
            skip_own: true,
        }
    }

    fn others(&self, all: usize, own: usize) -> Vec<usize> {
        (0..all)
            .filter(|&other| !self.skip_own || other != own)
            .collect()
    }

    /// Targets of one initiator.
    pub(super) fn targets_of(&self, initiator: usize) -> Vec<usize> {
        match self.scheme {
            Scheme::Pairwise => vec![initiator],
            Scheme::ManyToOne | Scheme::OneToMany | Scheme::AllToAll => {
                self.others(self.targets, initiator)
            }
        }
    }

    /// Initiators of one target.
    pub(super) fn initiators_of(&self, target: usize) -> Vec<usize> {
        match self.scheme {
            Scheme::Pairwise => vec![target],
            Scheme::ManyToOne | Scheme::OneToMany | Scheme::AllToAll => {
                self.others(self.initiators, target)
            }
        }
    }

    /// Pairs of an initiator and a target.
    pub(super) fn pairs(&self) -> usize {
        (0..self.initiators)
            .map(|initiator| self.targets_of(initiator).len())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_on_the_pairs_of_every_scheme() {
        for (scheme, initiators, targets, pairs) in [
            (Scheme::Pairwise, 3, 3, 3),
            (Scheme::ManyToOne, 3, 1, 3),
            (Scheme::OneToMany, 1, 4, 4),
            (Scheme::AllToAll, 3, 2, 6),
        ] {
            let topology = Topology::new(scheme, Some(initiators), Some(targets)).unwrap();
            assert_eq!(topology.pairs(), pairs, "{scheme:?}");
            for target in 0..targets {
                for initiator in 0..initiators {
                    assert_eq!(
                        topology.targets_of(initiator).contains(&target),
                        topology.initiators_of(target).contains(&initiator),
                        "{scheme:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn everybody_else_leaves_out_the_own_place() {
        let topology = Topology::between(4);
        assert_eq!(topology.pairs(), 12);
        assert_eq!(topology.targets_of(1), [0, 2, 3]);
        assert_eq!(topology.initiators_of(3), [0, 1, 2]);
    }

    #[test]
    fn numbers_that_do_not_fit_the_scheme_are_refused() {
        for (scheme, initiators, targets) in [
            (Scheme::Pairwise, Some(2), Some(3)),
            (Scheme::ManyToOne, None, Some(2)),
            (Scheme::OneToMany, Some(2), None),
            (Scheme::AllToAll, Some(0), None),
            (Scheme::AllToAll, Some(65), None),
        ] {
            assert!(
                Topology::new(scheme, initiators, targets).is_err(),
                "{scheme:?}"
            );
        }
        let default = Topology::new(Scheme::Pairwise, None, None).unwrap();
        assert_eq!((default.initiators, default.targets), (1, 1));
    }
}
