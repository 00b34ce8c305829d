use super::*;
use crate::service::formats::{GoZero, Kratos};

fn known(protection: Option<Protection>) -> Known {
    Known {
        format: Arc::new(GoZero),
        service: "s".into(),
        filter: Filter::default(),
        protection,
        entries: BTreeMap::new(),
        vanished: BTreeMap::new(),
    }
}

fn put(known: &mut Known, key: &str, address: &str, revision: i64) {
    known.put(&Entry {
        key: format!("s/{key}").into_bytes(),
        value: address.into(),
        create_revision: revision,
        mod_revision: revision,
        lease: 1,
    });
}

fn delete(known: &mut Known, key: &str) {
    known.delete(format!("s/{key}").as_bytes());
}

fn addresses(known: &mut Known) -> Vec<String> {
    known.snapshot(1).instances.iter().map(|instance| instance.address.clone()).collect()
}

#[test]
fn entries_with_one_id_are_one_instance() {
    let mut known = known(None);
    put(&mut known, "1", "x:1", 5);
    put(&mut known, "2", "x:1", 6);
    assert_eq!(addresses(&mut known), ["x:1"]);
    delete(&mut known, "1");
    assert_eq!(addresses(&mut known), ["x:1"]);
    delete(&mut known, "2");
    assert!(addresses(&mut known).is_empty());
}

#[test]
fn bad_update_keeps_the_last_good_state() {
    let mut known = known(None);
    put(&mut known, "1", "x:1", 5);
    put(&mut known, "1", "", 6);
    put(&mut known, "2", "", 7);
    let snapshot = known.snapshot(7);
    assert_eq!((snapshot.instances.len(), snapshot.malformed.len()), (1, 2));
    put(&mut known, "1", "y:1", 8);
    delete(&mut known, "2");
    assert_eq!(addresses(&mut known), ["y:1"]);
    assert!(known.snapshot(8).malformed.is_empty());
}

#[tokio::test(start_paused = true)]
async fn those_who_vanish_together_are_kept_for_a_while() {
    let keep = Duration::from_secs(30);
    let mut known = known(Some(Protection { share: 0.5, keep }));
    for key in ["a", "b", "c", "d"] {
        put(&mut known, key, key, 1);
    }
    // Half of them may go.
    delete(&mut known, "a");
    delete(&mut known, "b");
    assert_eq!(addresses(&mut known), ["c", "d"]);
    // With one more it is too many at once.
    delete(&mut known, "c");
    assert_eq!(addresses(&mut known), ["a", "b", "c", "d"]);
    assert_eq!(known.snapshot(1).kept, 3);
    delete(&mut known, "d");
    assert_eq!(addresses(&mut known).len(), 4, "an empty list is not believed");
    // Others come: those who are gone are gone.
    for key in ["e", "f", "g", "h"] {
        put(&mut known, key, key, 2);
    }
    assert_eq!(addresses(&mut known), ["e", "f", "g", "h"]);
    for key in ["e", "f", "g", "h"] {
        delete(&mut known, key);
    }
    assert_eq!(addresses(&mut known).len(), 8);
    assert_eq!(known.next_to_go(), Some(Instant::now() + keep));
    tokio::time::advance(keep).await;
    assert!(addresses(&mut known).is_empty());
    assert_eq!(known.next_to_go(), None);
}

/// However many may go.
#[test]
fn a_list_does_not_become_empty_at_once() {
    let mut known = known(Some(Protection { share: 1.0, keep: Duration::from_secs(30) }));
    put(&mut known, "1", "x:1", 5);
    put(&mut known, "2", "y:1", 5);
    delete(&mut known, "1");
    assert_eq!(addresses(&mut known), ["y:1"]);
    delete(&mut known, "2");
    assert_eq!(addresses(&mut known), ["x:1", "y:1"]);
}

#[test]
fn of_entries_with_one_id_the_newest_counts() {
    let value = |port: u16| {
        format!(r#"{{"id":"one","name":"s","version":"","metadata":{{}},"endpoints":["grpc://x:{port}"]}}"#)
    };
    for newest in ["a", "b", "c"] {
        let mut known = Known { format: Arc::new(Kratos::default()), ..known(None) };
        for (port, key) in (1..).zip(["a", "b", "c"]) {
            let revision = if key == newest { 9 } else { i64::from(port) };
            known.put(&Entry {
                key: format!("/microservices/s/{key}").into(),
                value: value(port).into(),
                create_revision: 1,
                mod_revision: revision,
                lease: 1,
            });
        }
        let port = newest.as_bytes()[0] - b'a' + 1;
        assert_eq!(addresses(&mut known), [format!("x:{port}")]);
    }
}

#[test]
fn those_who_come_back_are_not_counted_as_vanished() {
    let mut known = known(Some(Protection { share: 0.0, keep: Duration::from_secs(30) }));
    put(&mut known, "1", "x:1", 5);
    put(&mut known, "2", "y:1", 5);
    delete(&mut known, "1");
    assert_eq!(known.snapshot(6).kept, 1);
    put(&mut known, "1", "x:1", 7);
    assert_eq!(known.snapshot(7).kept, 0);
    // Also under another key.
    delete(&mut known, "1");
    put(&mut known, "3", "x:1", 8);
    assert_eq!(known.snapshot(8).kept, 0);
}
