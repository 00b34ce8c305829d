//! Large writes over a slow link: they are given time, and not begun anew again and again.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::service::Instance;
use etcd_recipes::{ConfigCache, Queue};

use super::{PATIENCE, Rig, side_by_side};
use crate::service_registration::services;
use crate::support::faults::{Fault, Until};

/// Of a value, in bytes.
const LARGE: usize = 1024 * 1024;

/// A small request would have been given up by then.
const SLOW: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy)]
enum What {
    Campaign,
    Proclaim,
    Transaction,
    Enqueue,
    Publish,
    Register,
}

#[test]
fn a_large_write_is_sent_once() {
    let all =
        [What::Campaign, What::Proclaim, What::Transaction, What::Enqueue, What::Publish, What::Register];
    side_by_side(all, async |scope, what| {
        let rig = Rig::new(scope, "name").await;
        let large = rig.faults.on("Txn").when(|request| request.len() > LARGE).always();
        let large = large.inject(Fault::Hold(Until::After(SLOW)));
        let value = || vec![b'x'; LARGE];
        let election = rig.election();
        match what {
            What::Campaign => {
                election.campaign(value()).await.unwrap().resign().await.unwrap();
            }
            What::Proclaim => {
                let leadership = election.campaign("").await.unwrap();
                leadership.proclaim(value()).await.unwrap();
                leadership.resign().await.unwrap();
            }
            What::Transaction => {
                let guard = rig.mutex().lock().await.unwrap();
                let key = scope.key("written");
                guard.txn(Txn::new().and_then([TxnOp::put(key.as_str(), value(), None)])).await.unwrap();
                guard.txn(Txn::new().and_then([TxnOp::delete(key, None)])).await.unwrap();
                guard.unlock().await.unwrap();
            }
            What::Enqueue => {
                let queue = Queue::new(&rig.session, scope.key("queue")).unwrap();
                queue.enqueue(value()).await.unwrap();
                assert!(queue.try_dequeue().await.unwrap().is_some());
            }
            What::Publish => {
                let config = ConfigCache::open(&rig.session, scope.key("config")).await.unwrap();
                config.publish("key", value()).await.unwrap();
                config.delete("key").await.unwrap();
            }
            What::Register => {
                let instance = Instance::new("large", "127.0.0.1:8400");
                let instance = instance.metadata("x", "x".repeat(LARGE));
                let registration = services(scope, &rig.session).register(instance).await.unwrap();
                tokio::time::timeout(PATIENCE, registration.deregister()).await.expect("stuck").unwrap();
            }
        }
        assert_eq!(large.hits(), 1, "{what:?}");
        rig.close().await;
    });
}
