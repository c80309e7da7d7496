//! Moving the bytes of one object.

use std::cell::Cell;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions,
};
use tokio::sync::Semaphore;

use super::client::{Client, kind_of};
use super::http::LAST_ANSWER;
use super::{ObjectList, ObjectWork};
use crate::memory::copy_bytes;
use crate::op::Work;
use crate::plan::{Order, Segments};
use crate::storage::{StorageAction, StorageError, StorageErrorKind};

/// Parts of one object under way at a time, if there is room for them.
const PARTS_AT_A_TIME: u32 = 8;

/// Bound on telling a store to forget the parts of an upload that failed.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs `future` and sorts its error.
async fn sorted<T>(
    client: &Client,
    action: StorageAction,
    path: &Path,
    offset: u64,
    future: impl Future<Output = object_store::Result<T>>,
) -> Result<T, StorageError> {
    LAST_ANSWER
        .scope(Cell::default(), async {
            future.await.map_err(|error| StorageError {
                action,
                store: client.object(path),
                offset,
                kind: kind_of(&error, LAST_ANSWER.with(Cell::get)),
            })
        })
        .await
}

/// Reads object `part` into its block.
pub(super) async fn read(
    work: &Arc<Work>,
    objects: &ObjectWork,
    part: u32,
) -> Result<(), StorageError> {
    let Some(path) = objects.paths.get(part as usize) else {
        return Ok(());
    };
    let client = &*objects.client;
    let expected = objects.object_bytes;
    let action = StorageAction::Read;
    let error = |offset, kind| StorageError {
        action,
        store: client.object(path),
        offset,
        kind,
    };
    let options = GetOptions {
        range: objects.range.clone().map(GetRange::Bounded),
        ..GetOptions::default()
    };
    let result = sorted(
        client,
        action,
        path,
        objects.range.as_ref().map_or(0, |range| range.start),
        client.store.get_opts(path, options),
    )
    .await?;
    let length = |got| StorageErrorKind::Length { expected, got };
    let offered = result.range.end.saturating_sub(result.range.start);
    if offered != expected {
        return Err(error(0, length(offered)));
    }
    let first = result.range.start;
    let mut body = result.into_stream();
    let mut at = 0;
    loop {
        let next = sorted(client, action, path, first + at, async {
            match tokio::time::timeout(client.timeout, body.next()).await {
                Ok(next) => Ok(Some(next.transpose()?)),
                Err(_) => Ok(None),
            }
        })
        .await?;
        let Some(chunk) = next else {
            return Err(error(first + at, StorageErrorKind::TimedOut));
        };
        let Some(chunk) = chunk else { break };
        let bytes = chunk.len() as u64;
        if at + bytes > expected {
            return Err(error(first + at, length(at + bytes)));
        }
        scatter(work, u64::from(part) * expected + at, &chunk);
        at += bytes;
    }
    if at == expected {
        Ok(())
    } else {
        Err(error(first + at, length(at)))
    }
}

/// Writes object `part` from its block.
pub(super) async fn write(
    work: &Arc<Work>,
    objects: &Arc<ObjectWork>,
    part: u32,
    requests: &Arc<Semaphore>,
) -> Result<(), StorageError> {
    let Some(path) = objects.paths.get(part as usize) else {
        return Ok(());
    };
    let client = &*objects.client;
    let first = u64::from(part) * objects.object_bytes;
    if objects.object_bytes > objects.part_bytes && !objects.create_only {
        return write_parts(work, objects, path, first, requests).await;
    }
    let mode = if objects.create_only {
        PutMode::Create
    } else {
        PutMode::Overwrite
    };
    let payload = gather(work, first, objects.object_bytes);
    let options = PutOptions::from(mode);
    let put = client.store.put_opts(path, payload.into(), options);
    sorted(client, StorageAction::Write, path, 0, put).await?;
    Ok(())
}

/// An upload whose parts the store forgets unless it is completed.
struct Upload {
    upload: Option<Box<dyn MultipartUpload>>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else {
            return;
        };
        // Nothing can appear under the key any more: only this object could complete it.
        tokio::spawn(async move {
            match tokio::time::timeout(ABORT_TIMEOUT, upload.abort()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "parts of an upload are left behind"),
                Err(_) => tracing::warn!("parts of an upload may be left behind: no answer"),
            }
        });
    }
}

async fn write_parts(
    work: &Arc<Work>,
    objects: &Arc<ObjectWork>,
    path: &Path,
    first: u64,
    requests: &Arc<Semaphore>,
) -> Result<(), StorageError> {
    let client = &*objects.client;
    let action = StorageAction::Write;
    let start = client
        .store
        .put_multipart_opts(path, PutMultipartOptions::default());
    let mut guard = Upload {
        upload: Some(sorted(client, action, path, 0, start).await?),
    };
    let Some(upload) = guard.upload.as_mut() else {
        return Ok(());
    };
    // This object has room for one request already; more only if nobody waits for it.
    let mut extra = Vec::new();
    while extra.len() + 1 < PARTS_AT_A_TIME as usize {
        let Ok(permit) = requests.try_acquire() else {
            break;
        };
        extra.push(permit);
    }
    let at_a_time = extra.len() + 1;
    let mut flying = FuturesUnordered::new();
    let mut at = 0;
    loop {
        while at < objects.object_bytes && flying.len() < at_a_time {
            let bytes = objects.part_bytes.min(objects.object_bytes - at);
            let payload = gather(work, first + at, bytes);
            let part = upload.put_part(payload.into());
            flying.push(sorted(client, action, path, at, part));
            at += bytes;
        }
        match flying.next().await {
            Some(done) => done?,
            None => break,
        }
    }
    drop(flying);
    sorted(client, action, path, 0, upload.complete()).await?;
    guard.upload = None;
    Ok(())
}

/// Length, tag and time of an object, if it exists.
pub(super) async fn head(
    client: &Client,
    path: &Path,
) -> Result<Option<object_store::ObjectMeta>, StorageError> {
    let found = sorted(
        client,
        StorageAction::Query,
        path,
        0,
        client.store.head(path),
    )
    .await;
    match found {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind == StorageErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first `limit` objects below a folder.
pub(super) async fn list(
    client: &Client,
    below: Option<&Path>,
    limit: usize,
) -> Result<ObjectList, StorageError> {
    let root = Path::default();
    let name = below.unwrap_or(&root);
    let mut found = ObjectList::default();
    let mut objects = client.store.list(below);
    loop {
        let next = sorted(client, StorageAction::List, name, 0, async {
            objects.next().await.transpose()
        });
        let Some(meta) = next.await? else {
            found.complete = true;
            return Ok(found);
        };
        // What is not below the prefix was not asked for.
        let Some(key) = client.key(&meta.location) else {
            continue;
        };
        if found.objects.len() >= limit {
            return Ok(found);
        }
        found.objects.push((key, meta.size));
    }
}

/// Deletes an object; one that does not exist is deleted already.
pub(super) async fn delete(client: &Client, path: &Path) -> Result<(), StorageError> {
    let deleted = sorted(
        client,
        StorageAction::Delete,
        path,
        0,
        client.store.delete(path),
    );
    match deleted.await {
        Err(error) if error.kind != StorageErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Copies the local bytes of a logical range of the (only) set of an operation.
fn gather(work: &Work, first: u64, bytes: u64) -> Bytes {
    let mut out = vec![0u8; usize::try_from(bytes).unwrap_or(0)];
    let to = out.as_mut_ptr();
    let mut at = 0;
    for_each_local(work, first, out.len(), |local, bytes| {
        // SAFETY: the pieces of the range have its length together, so this stays inside `out`.
        let to = unsafe { to.add(at) };
        // SAFETY: `local` is inside a live region by the contract of `for_each_local`, and `out`
        // belongs to this function.
        unsafe { copy_bytes(local, to, bytes) };
        at += bytes;
    });
    out.into()
}

/// Copies `from` to the local bytes of a logical range that begins at `first`.
fn scatter(work: &Work, first: u64, from: &Bytes) {
    let mut at = 0;
    for_each_local(work, first, from.len(), |local, bytes| {
        // SAFETY: as in `gather`: inside `from`.
        let from = unsafe { from.as_ptr().add(at) };
        // SAFETY: as in `gather`; a transfer that reads owns its local bytes.
        unsafe { copy_bytes(from, local, bytes) };
        at += bytes;
    });
}

/// Calls `f` with each local piece of a logical range; all of them lie in the live local region.
fn for_each_local(work: &Work, first: u64, bytes: usize, mut f: impl FnMut(*mut u8, usize)) {
    let Some(set) = work.sets.first() else { return };
    let range = first..first + bytes as u64;
    for (offset, bytes) in Segments::new(&set.local, Order::BlockMajor, range) {
        // Offsets lie inside a region, whose length is a usize.
        let [offset, bytes] = [offset, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
        // SAFETY: the set is validated against this region, which `work` keeps alive.
        f(unsafe { set.local_region.base().add(offset) }, bytes);
    }
}
