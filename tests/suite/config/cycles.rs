//! Cut, compact, restart, again and again: the cache comes to what etcd has, and handlers hear of every deletion.

use std::time::Duration;

use etcd_recipes::ConfigCache;

use super::{Behind, Told, at_etcd, cached, put, remove, wipe};
use crate::support::check::scoped_on;
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::Mode;
use crate::support::rounds;

/// Within this time after etcd can be reached, the cache has what etcd has; a machine under load is given more.
const SOON: Duration = Duration::from_secs(2);
const LATE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn cut_compact_restart_and_converge() {
    if lacking(Needs::Disk) {
        return;
    }
    let cycles = rounds(15, 200);
    let behind = Behind::start().await;
    scoped_on(&behind.server, async |scope| {
        let session = behind.session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let (told, _handler) = Told::by(&config);
        let mut random = fastrand::Rng::with_seed(42);
        let mut late = Vec::new();
        for cycle in 0..cycles {
            match cycle % 4 {
                0 => behind.proxy.set(Mode::Refuse).await,
                1 => behind.proxy.set(Mode::Drop).await,
                2 => behind.proxy.reset_all().await,
                _ => behind.proxy.set(Mode::HoleBoth).await,
            }
            for write in 0..20 {
                let key = random.u8(..20).to_string();
                if random.u8(..3) == 0 {
                    remove(scope, &key).await;
                } else {
                    put(scope, &key, &format!("{cycle}.{write}")).await;
                }
            }
            if cycle % 2 == 0 {
                behind.server.compact().await;
            }
            if cycle % 3 == 0 {
                behind.server.restart().await;
            }
            if cycle % 4 == 3 {
                // What is cut off without a word is noticed in its own time; here it is not waited for.
                behind.proxy.set(Mode::Drop).await;
            }
            behind.proxy.set(Mode::Pass).await;
            let expected = at_etcd(scope).await;
            let start = std::time::Instant::now();
            while cached(&config) != expected {
                assert!(start.elapsed() < LATE, "cycle {cycle}: {:?} is not {expected:?}", cached(&config));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            late.extend((start.elapsed() > SOON).then(|| start.elapsed()));
            told.converges(&expected).await;
        }
        assert!(late.len() <= cycles / 20, "not within {SOON:?}: {late:?}");
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
