//! Reads from memory, by two threads while a third party writes.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::{ConfigCache, Session};
use tokio_util::sync::CancellationToken;

use super::{Bench, KEYS};
use crate::common::compare::{Figure, Rounds};
use crate::common::line::Line;
use crate::sync::{Large, key, value};

const READERS: usize = 2;
/// Between two writes.
const PAUSE: Duration = Duration::from_millis(1);

pub(crate) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let large = Large::fill(bench).await?;
    let session = Session::connect([&bench.options.endpoint]).await?;
    let cache = ConfigCache::open(&session, &large.name).await?;
    ensure!(cache.snapshot().len() == KEYS, "not all keys are there");
    let plain: HashMap<Vec<u8>, Vec<u8>> =
        (0..KEYS).map(|number| (key(number).into_bytes(), value(number).into_bytes())).collect();
    let (plain, keys) = (Arc::new(plain), Arc::new(shuffled()));
    for key in &*keys {
        cache.get_as::<String>(key)?.context("a key is missing")?;
    }
    let stop = CancellationToken::new();
    let writer = tokio::spawn(write(cache.clone(), stop.clone()));
    let reads = if bench.options.quick { 1_000_000 } else { 5_000_000 };
    let rounds = if bench.options.quick { 2 } else { 10 };
    let of_map = async || {
        let (plain, keys) = (plain.clone(), keys.clone());
        read(reads, keys, move |key| plain.get(key).map_or(0, Vec::len)).await
    };
    let of_bytes = async || {
        let (cache, keys) = (cache.clone(), keys.clone());
        read(reads, keys, move |key| cache.get(key).map_or(0, |entry| entry.value().len())).await
    };
    let of_types = async || {
        let (cache, keys) = (cache.clone(), keys.clone());
        read(reads, keys, move |key| cache.get_as::<String>(key).ok().flatten().map_or(0, |text| text.len()))
            .await
    };
    let of_snapshot = async || {
        let (snapshot, keys) = (cache.snapshot(), keys.clone());
        read(reads, keys, move |key| snapshot.get(key).map_or(0, |entry| entry.value().len())).await
    };
    let nanos = |line: &Line| line.extra("nanos");
    let show = |nanos: f64| format!("{nanos:.0} ns");
    let figures = vec![
        Rounds::run(rounds, of_bytes, of_map).await?.ratio(nanos, show),
        Rounds::run(rounds, of_types, of_map).await?.ratio(nanos, show),
        Rounds::run(rounds, of_snapshot, of_map).await?.ratio(nanos, show),
    ];
    stop.cancel();
    writer.await??;
    session.close().await?;
    large.remove().await?;
    Ok(figures)
}

fn shuffled() -> Vec<Vec<u8>> {
    let mut keys: Vec<_> = (0..KEYS).map(|number| key(number).into_bytes()).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut keys);
    keys
}

async fn write(cache: ConfigCache, stop: CancellationToken) -> Result<()> {
    for number in (0..KEYS).cycle() {
        if stop.is_cancelled() {
            break;
        }
        cache.publish(key(number), value(number)).await?;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// The time of one read, with all readers at work.
async fn read(
    reads: usize,
    keys: Arc<Vec<Vec<u8>>>,
    get: impl Fn(&[u8]) -> usize + Clone + Send + 'static,
) -> Result<Line> {
    let reader = |number: usize| {
        let (get, keys) = (get.clone(), keys.clone());
        tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            let mut bytes = 0;
            for key in keys.iter().cycle().skip(number * KEYS / READERS).take(reads) {
                bytes += get(black_box(key));
            }
            black_box(bytes);
            start.elapsed()
        })
    };
    let readers: Vec<_> = (0..READERS).map(reader).collect();
    let mut sum = Duration::ZERO;
    for reader in readers {
        sum += reader.await?;
    }
    let mut line = Line::default();
    line.extra.insert("nanos".into(), (sum.as_nanos() as f64 / (reads * READERS) as f64).into());
    Ok(line)
}
