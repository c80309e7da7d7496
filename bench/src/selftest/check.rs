//! The list of checks.

use std::time::Duration;

use blockplane_transfer::Op;

use super::{
    copies, events,
    faults::{self, Loss},
    large, leaks, many,
    notify::{self, Load},
    place::Place,
    sanitizer,
    stage::{self, Far},
    tensors, tiers,
    world::{Outcome, Processes, Way, World},
};

const WHERE: [(&str, Processes); 2] = [
    ("one-process", Processes::One),
    ("two-processes", Processes::Two),
];
const SMALL: Load = Load {
    count: 10_000,
    slot_bytes: 8 << 10,
};
const LARGE: Load = Load {
    count: 200,
    slot_bytes: 32 << 20,
};

/// What a check does, with its name.
type Run = dyn Fn(&mut World, &str) -> anyhow::Result<Outcome>;

/// One check.
pub(super) struct Check {
    pub(super) name: String,
    /// A check that takes longer hangs.
    pub(super) limit: Duration,
    /// It works without any device: it shows that the checks themselves are sound.
    pub(super) control: bool,
    pub(super) run: Box<Run>,
}

impl Check {
    fn new(
        name: impl Into<String>,
        limit_s: u64,
        run: impl Fn(&mut World, &str) -> anyhow::Result<Outcome> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            limit: Duration::from_secs(limit_s),
            control: false,
            run: Box::new(run),
        }
    }
}

/// All checks, in the order in which they run.
pub(super) fn all() -> Vec<Check> {
    let mut checks = controls();
    for (where_, processes) in WHERE {
        for local in Place::ALL {
            for remote in Place::ALL {
                if local.device().is_none() && remote.device().is_none() {
                    continue;
                }
                let name = format!("copy/{where_}/{local}/{remote}");
                checks.push(Check::new(name, 30, move |world, name| {
                    copies::check(world, name, processes.into(), (local, remote))
                }));
            }
        }
    }
    for (where_, processes) in WHERE {
        for (local, remote) in [
            (Place::File(0), Place::File(1)),
            (Place::Foreign(1), Place::Handle(0)),
        ] {
            let name = format!("copy/pulled/{where_}/{local}/{remote}");
            let way = Way {
                processes,
                pull: true,
            };
            checks.push(Check::new(name, 30, move |world, name| {
                copies::check(world, name, way, (local, remote))
            }));
        }
    }
    for (where_, processes) in WHERE {
        for (local, remote) in [
            (Place::File(0), Place::File(1)),
            (Place::Handle(1), Place::Handle(0)),
            (Place::File(0), Place::File(0)),
            (Place::Foreign(0), Place::Pinned),
            (Place::Plain, Place::File(0)),
        ] {
            let name = format!("rearrange/{where_}/{local}/{remote}");
            checks.push(Check::new(name, 30, move |world, name| {
                tensors::check(world, name, processes, (local, remote))
            }));
        }
    }
    for (size, load) in [("small", SMALL), ("large", LARGE)] {
        for (local, remote) in [
            (Place::File(0), Place::File(1)),
            (Place::Handle(0), Place::Handle(0)),
            (Place::File(0), Place::Pinned),
            (Place::Pinned, Place::File(0)),
        ] {
            let name = format!("notify/{size}/{local}/{remote}");
            checks.push(Check::new(name, 40, move |world, name| {
                notify::check(world, name, (local, remote), load)
            }));
        }
    }
    for target in [Place::File(0), Place::File(1), Place::Pinned] {
        let name = format!("event/order/{target}");
        checks.push(Check::new(name, 40, move |world, _| {
            events::order(world, target)
        }));
        let name = format!("event/never/{target}");
        checks.push(Check::new(name, 40, move |world, _| {
            events::never(world, target)
        }));
    }
    checks.push(Check::new("event/after-work", 30, |world, _| {
        events::after_work(world)
    }));
    checks.extend(large_ones());
    checks.extend(staged("stage", Some(0)));
    checks.push(Check::new("tiers", 60, |world, name| {
        tiers::check(world, name, Some(0))
    }));
    checks.push(Check::new("stage/event", 30, |world, _| {
        stage::event(world)
    }));
    checks.extend(faults());
    for (where_, processes, times) in [
        ("one-process", Processes::One, 200),
        ("two-processes", Processes::Two, 50),
    ] {
        checks.push(Check::new(
            format!("leaks/{where_}"),
            60,
            move |world, _| leaks::rounds(world, processes, times),
        ));
    }
    checks.push(Check::new("idle", 20, |world, _| leaks::idle(world)));
    for target in [Place::File(0), Place::Pinned] {
        let name = format!("sanitizer/{target}");
        checks.push(Check::new(name, 30, move |world, _| {
            sanitizer::copies(world, target)
        }));
    }
    checks
}

/// Device memory, or host memory, to places that devices do not reach.
fn staged(group: &str, device: Option<u32>) -> Vec<Check> {
    let far = |what: &str, far| {
        Check::new(format!("{group}/{what}"), 90, move |world, name| {
            stage::check(world, name, far, device)
        })
    };
    let object = Check::new(format!("{group}/object"), 40, move |world, name| {
        stage::objects(world, name, device)
    });
    vec![far("file", Far::File), far("tcp", Far::Tcp), object]
}

/// Large transfers, and many.
fn large_ones() -> Vec<Check> {
    let mut checks = vec![
        Check::new("large/behind-4-gib", 40, |world, name| {
            large::far(world, name)
        }),
        Check::new("large/launches", 40, |world, name| {
            large::launches(world, name)
        }),
    ];
    for target in [Place::File(0), Place::File(1), Place::Pinned, Place::Plain] {
        let name = format!("large/engine/{target}");
        checks.push(Check::new(name, 30, move |world, name| {
            large::engine(world, name, target)
        }));
    }
    for places in [
        (Place::File(0), Place::File(1)),
        (Place::Handle(0), Place::Pinned),
        (Place::Plain, Place::File(0)),
    ] {
        let (local, remote) = places;
        let name = format!("many/{local}/{remote}");
        checks.push(Check::new(name, 40, move |world, name| {
            many::at_once(world, name, places)
        }));
        let name = format!("many/closed-under/{local}/{remote}");
        checks.push(Check::new(name, 40, move |world, _| {
            many::closed_under(world, places)
        }));
    }
    checks
}

/// What goes wrong, and how it ends.
fn faults() -> Vec<Check> {
    let mut checks = Vec::new();
    for place in [Place::File(1), Place::Handle(1), Place::Pinned] {
        for (what, op) in [("written-to", Op::Write), ("read-from", Op::Read)] {
            for (how, loss) in [("killed", Loss::Killed), ("stopped", Loss::Stopped)] {
                let name = format!("fault/peer-{how}/{what}/{place}");
                checks.push(Check::new(name, 40, move |world, _| {
                    faults::peer_lost(world, loss, op, place)
                }));
            }
            let name = format!("fault/cancelled/{what}/{place}");
            checks.push(Check::new(name, 60, move |world, _| {
                faults::cancelled(world, op, place)
            }));
        }
        let name = format!("fault/freed-early/{place}");
        checks.push(Check::new(name, 40, move |world, _| {
            faults::freed_early(world, place)
        }));
    }
    checks.push(Check::new("fault/out-of-memory", 40, |world, _| {
        faults::out_of_memory(world)
    }));
    checks.push(Check::new("fault/unseen-device", 30, |world, _| {
        faults::unseen_device(world)
    }));
    checks.push(Check::new("fault/unshareable", 30, |world, _| {
        faults::unshareable(world)
    }));
    for place in [Place::File(0), Place::Pinned] {
        let name = format!("fault/bad-pointer/{place}");
        checks.push(Check::new(name, 40, move |world, _| {
            faults::bad_pointer(world, place)
        }));
    }
    checks
}

/// The same between host arenas, where no device takes part.
fn controls() -> Vec<Check> {
    const PLACES: (Place, Place) = (Place::Plain, Place::Plain);
    let mut checks = Vec::new();
    for (where_, processes) in WHERE {
        checks.push(Check::new(
            format!("control/copy/{where_}"),
            30,
            move |world, name| copies::check(world, name, processes.into(), PLACES),
        ));
        checks.push(Check::new(
            format!("control/rearrange/{where_}"),
            30,
            move |world, name| tensors::check(world, name, processes, PLACES),
        ));
    }
    checks.push(Check::new("control/notify", 30, |world, name| {
        notify::check(world, name, PLACES, SMALL)
    }));
    checks.push(Check::new("control/tiers", 60, |world, name| {
        tiers::check(world, name, None)
    }));
    checks.extend(staged("control/stage", None));
    for check in &mut checks {
        check.control = true;
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different() {
        let mut names: Vec<_> = all().into_iter().map(|check| check.name).collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
