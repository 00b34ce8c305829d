//! What the benches share: command lines, counters, workers, result lines, comparisons and the table.

// Each bench is a program of its own and uses a part of this.
#![allow(dead_code)]

pub(crate) mod compare;
pub(crate) mod counters;
pub(crate) mod crew;
pub(crate) mod line;
pub(crate) mod load;
pub(crate) mod options;
pub(crate) mod proxy;
pub(crate) mod table;

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use futures::{StreamExt as _, TryStreamExt as _, stream};

/// How many connections or sessions are opened at once.
const OPENING: usize = 64;

/// Opens `count` things, several at once; in order.
pub(crate) async fn open<T, F>(count: usize, one: impl Fn(usize) -> F) -> Result<Vec<T>>
where
    F: Future<Output = Result<T>>,
{
    stream::iter((0..count).map(one)).buffered(OPENING).try_collect().await
}

/// A name nobody has used before.
pub(crate) fn fresh(what: &str) -> String {
    static USED: AtomicU32 = AtomicU32::new(0);
    format!("bench/{what}/{}-{}", std::process::id(), USED.fetch_add(1, Ordering::Relaxed))
}
