//! Clients that go away: nobody computes for them any longer than it takes to notice.

use std::{ops::ControlFlow, time::Duration};

use anyhow::{Result, ensure};
use blockplane_tests::{
    Outcome, Role,
    health::{self, Health},
    process::{self, Signal},
};

use crate::scene::{HUNG, Scene, streams};

fn tokens_generated(health: &Health) -> u64 {
    let loads = health.workers.iter().flat_map(|worker| &worker.load);
    loads.map(|load| load.decode_tokens_total).sum()
}

/// Streams cut after a few tokens of thousands stop being generated.
#[test]
fn in_the_middle_of_a_stream() -> Result<()> {
    let scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let bodies = streams(41, 8, 200, 3800);
    let before = tokens_generated(&Health::read(&scene.client)?);
    std::thread::scope(|scope| {
        let threads: Vec<_> = bodies
            .iter()
            .map(|body| {
                let client = &scene.client;
                scope.spawn(move || {
                    client.run_with("/v1/completions", body, HUNG, &mut |so_far| {
                        if so_far.chunks < 3 {
                            ControlFlow::Continue(())
                        } else {
                            ControlFlow::Break(())
                        }
                    })
                })
            })
            .collect();
        for thread in threads {
            let outcome = thread.join();
            ensure!(matches!(outcome, Ok(Outcome::Left(_))), "{outcome:?}");
        }
        Ok(())
    })?;
    health::wait_idle(&scene.client, HUNG)?;
    let generated = tokens_generated(&Health::read(&scene.client)?) - before;
    ensure!(
        generated < 8 * 3800 / 2,
        "{generated} tokens for clients that had left"
    );
    eprintln!("{generated} tokens were generated for 8 clients that left after about 3");
    scene.end()
}

/// Clients that go before the first token, while the prompt is with a (stopped) prefill worker.
#[test]
fn before_the_first_token() -> Result<()> {
    for lane in ["shm", "tcp"] {
        let mut scene = Scene::new(&[Role::Prefill, Role::Decode], lane)?;
        let prefill = scene.cluster.signal(Role::Prefill, Signal::STOP)?;
        std::thread::scope(|scope| {
            for body in &streams(42, 4, 600, 100) {
                let (client, body) = (&scene.client, body.clone());
                scope.spawn(move || {
                    client.run("/v1/completions", &body, Duration::from_millis(500))
                });
            }
        });
        process::send(prefill, Signal::CONT)?;
        scene.wait_workers(Role::Prefill, 1)?;
        let pools = health::wait_idle(&scene.client, HUNG)?;
        ensure!(
            pools == scene.pools,
            "{pools:?}, at the start {:?}",
            scene.pools
        );
        scene.end()?;
    }
    Ok(())
}
