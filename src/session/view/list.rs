//! Reading a prefix whole: in pages, all of one revision.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, GetResponse};

use super::{ByKey, Entries, Entry, Values};
use crate::error::{Error, Result};
use crate::name::Prefix;
use crate::session::Core;
use crate::session::rpc::revision as revision_of;
use crate::session::runtime::Backoff;

/// Keys in the first page.
const FIRST: i64 = 500;
/// Bytes wanted in a page: etcd walks over the whole rest of the range for each, so few are better, and each is in memory
/// twice for a moment.
const WANTED: i64 = 2 * 1024 * 1024;
/// What a key costs in an answer beside its bytes and those of its value.
const OVERHEAD: usize = 32;

/// Lists a prefix; tries until etcd answers. Entries that are still as in `held` are those of `held`.
pub(super) async fn list(
    core: &Core,
    prefix: &Prefix,
    values: Values,
    held: &Entries,
) -> Result<(Entries, i64)> {
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(2));
    let list = async {
        loop {
            if let Some(listed) = pages(core, prefix, values, held).await? {
                return Ok(listed);
            }
            backoff.wait(&core.runtime).await;
        }
    };
    tokio::select! {
        biased;
        () = core.closing.cancelled() => Err(Error::Closed),
        listed = list => listed,
    }
}

/// Reads page after page. `None`: the revision of the first was compacted meanwhile.
async fn pages(
    core: &Core,
    prefix: &Prefix,
    values: Values,
    held: &Entries,
) -> Result<Option<(Entries, i64)>> {
    let mut entries = Entries::new();
    let mut from = prefix.as_bytes().to_vec();
    let (mut at, mut limit) = (0, FIRST);
    loop {
        let mut options = GetOptions::new().with_range(prefix.end()).with_limit(limit).with_revision(at);
        if values == Values::Drop {
            options = options.with_keys_only();
        }
        let mut page = match core.rpc.get(&from, options, Some(core.rpc.timeout * 2)).await {
            Ok(page) => page,
            // Perhaps the link is too slow for so much at once.
            Err(Error::Unreachable { .. }) => {
                limit = (limit / 2).max(1);
                continue;
            }
            // Compacted; or a backup was restored, and the revision is not there yet.
            Err(Error::Etcd { .. }) if at != 0 => return Ok(None),
            Err(error) => return Err(error),
        };
        if at == 0 {
            at = revision_of(page.header());
        }
        let bytes = take(&mut page, &mut entries, held);
        if !page.more() {
            return Ok(Some((entries, at)));
        }
        if let Some(ByKey(last)) = entries.last() {
            from.clone_from(&last.key);
            from.push(0);
        }
        limit = (limit.saturating_mul(WANTED) / bytes.max(1)).clamp(1, limit.saturating_mul(8));
    }
}

/// Whether what a prefix held at `revision`, `len` keys, is all that it holds now: then the revision of now.
///
/// Proved by a read: no key was written since, so all there are were there; and they are as many.
pub(crate) async fn unchanged(
    core: &Core,
    prefix: &Prefix,
    revision: i64,
    len: usize,
) -> Result<Option<i64>> {
    let options = GetOptions::new()
        .with_range(prefix.end())
        .with_min_mod_revision(revision + 1)
        .with_keys_only()
        .with_limit(1);
    let read = core.rpc.get(prefix.as_bytes(), options, Some(core.rpc.timeout * 2)).await?;
    let same = read.kvs().is_empty() && usize::try_from(read.count()).is_ok_and(|count| count == len);
    Ok(same.then(|| revision_of(read.header())))
}

/// Moves a page into the entries; tells its size.
fn take(page: &mut GetResponse, entries: &mut Entries, held: &Entries) -> i64 {
    let mut bytes = 0;
    for kv in page.take_kvs() {
        let (create_revision, mod_revision, lease) = (kv.create_revision(), kv.mod_revision(), kv.lease());
        let (key, value) = kv.into_key_value();
        bytes += key.len() + value.len() + OVERHEAD;
        let entry = Entry { key, value, create_revision, mod_revision, lease };
        entries.insert(match held.get(entry.key.as_slice()) {
            Some(ByKey(same)) if **same == entry => ByKey(same.clone()),
            _ => ByKey(Arc::new(entry)),
        });
    }
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
