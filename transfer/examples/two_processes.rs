//! Two processes: "prefill" writes blocks into the memory of "decode", which it starts itself.
//!
//! They meet through a folder. Decode opens a window over the blocks that it wants filled and names
//! it in a notification; prefill writes them and binds the news to the transfer.

#![expect(clippy::print_stdout, reason = "an example shows what happens")]

use std::error::Error;
use std::process::{Child, Command};
use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, FolderStore, LocalBlocks, LookupError, Op,
    PostOptions, RegionId, RemoteAccess, RemoteBlocks, WindowAccess, WindowId, WindowScope,
};

const TIMEOUT: Duration = Duration::from_secs(20);
/// 64 blocks of 16 KiB on both sides.
const LAYOUT: BlockLayout = BlockLayout::contiguous(64, 16 << 10);
const BYTES: usize = 64 * (16 << 10);

fn main() -> Result<(), Box<dyn Error>> {
    // With a folder as its argument this program is the second process.
    if let Some(folder) = std::env::args().nth(1) {
        return decode(&FolderStore::new(folder)?);
    }
    let folder = std::env::temp_dir().join(format!("two-processes-{}", std::process::id()));
    let result = prefill(&FolderStore::new(&folder)?, || {
        Command::new(std::env::current_exe()?).arg(&folder).spawn()
    });
    std::fs::remove_dir_all(&folder)?;
    result
}

/// Owns the blocks, fills them, and writes them where the other wants them.
fn prefill(
    store: &FolderStore,
    start_decode: impl FnOnce() -> std::io::Result<Child>,
) -> Result<(), Box<dyn Error>> {
    let agent = Agent::new(AgentConfig::new("prefill"))?;
    let source = agent.allocate(ArenaConfig::new(BYTES, "source"))?;
    for (id, text) in [(3, "the third block"), (40, "the fortieth block")] {
        source.write_at(id * LAYOUT.block_stride, text.as_bytes())?;
    }
    agent.publish(store, Some(TIMEOUT))?;
    let mut child = start_decode()?;

    // "Fill window W of region R": sixteen bytes. They come after decode has published itself.
    let wish = agent.notifications().recv_timeout(TIMEOUT)?;
    let (region, window) = wish.payload.split_at(8);
    let region = RegionId(u64::from_le_bytes(region.try_into()?));
    let window = WindowId(u64::from_le_bytes(window.try_into()?));

    let peer = agent.connect_by_name(store, &wish.from, TIMEOUT)?;
    println!(
        "prefill reaches decode over {}: {}",
        peer.lane().lane,
        peer.lane().reason
    );
    let local = LocalBlocks {
        registration: &source,
        layout: LAYOUT,
        ids: [3, 40].into(),
        layers: 0..1,
    };
    let remote = RemoteBlocks {
        peer: &peer,
        region,
        layout: LAYOUT,
        ids: (10..12).into(),
        layers: 0..1,
        window: Some(window),
    };
    let prepared = agent.prepare(Op::Write, local, remote)?;
    let options = PostOptions::within(TIMEOUT)
        .notify("blocks 10 and 11 are there")
        .request_id("request 1");
    let transfer = prepared.post(options)?;
    transfer.wait(TIMEOUT)?;
    if let Some(told) = transfer.telemetry() {
        println!("prefill wrote {} bytes in {:?}", told.bytes, told.total);
    }
    let status = child.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("decode failed: {status}").into())
    }
}

/// Owns the memory that is written to, and says which part of it may be.
fn decode(store: &FolderStore) -> Result<(), Box<dyn Error>> {
    let agent = Agent::new(AgentConfig::new("decode"))?;
    let config = ArenaConfig::new(BYTES, "target").with_access(RemoteAccess::WindowOnly);
    let target = agent.allocate(config)?;
    let scope = WindowScope::Blocks {
        layout: LAYOUT,
        ids: vec![10, 11],
    };
    let window = agent.open_window(&target, scope, WindowAccess::Write)?;
    agent.publish(store, Some(TIMEOUT))?;

    let peer = match agent.connect_by_name(store, "prefill", TIMEOUT) {
        Err(LookupError::NotFound { name }) => return Err(format!("{name} is not here").into()),
        other => other?,
    };
    let mut wish = target.id().0.to_le_bytes().to_vec();
    wish.extend(window.id().0.to_le_bytes());
    agent.notify(&peer, wish, TIMEOUT)?.wait(TIMEOUT)?;

    let news = agent.notifications().recv_timeout(TIMEOUT)?;
    println!(
        "decode hears from {}: {}",
        news.from,
        String::from_utf8_lossy(&news.payload)
    );
    // After this nobody can write the blocks any more, and they can be used.
    window.close(TIMEOUT)?;
    let mut bytes = [0; 18];
    target.read_at(11 * LAYOUT.block_stride, &mut bytes)?;
    assert_eq!(&bytes, b"the fortieth block");
    Ok(())
}
