use etcd_client::proto::PbKeyValue;
use futures::FutureExt as _;

use super::*;

/// A watch of everything, with one subscriber.
fn watch() -> (Watch, Receiver<Message>) {
    let (sender, messages) = channel(QUEUE);
    let range = Range { key: b"a".to_vec(), end: Some(b"b".to_vec()) };
    let mut watch = Watch::new(Arc::new(range), Some(1), None);
    watch.subscribers.push((1, sender));
    (watch, messages)
}

/// The revisions of puts, one event each, as etcd tells them.
fn puts(revisions: &[i64]) -> Vec<PbEvent> {
    let put = |revision: &i64| {
        let kv =
            PbKeyValue { key: format!("a{revision}").into(), mod_revision: *revision, ..Default::default() };
        PbEvent { kv: Some(kv), ..Default::default() }
    };
    revisions.iter().map(put).collect()
}

/// The revisions told by now, by message.
fn told(messages: &mut Receiver<Message>) -> Vec<Vec<i64>> {
    let next = || match messages.next().now_or_never()?? {
        Message::Events(events) => Some(events.iter().map(|event| event.revision).collect()),
        other => panic!("{other:?}"),
    };
    std::iter::from_fn(next).collect()
}

#[test]
fn a_revision_in_several_messages_is_told_as_one() {
    let (mut watch, mut messages) = watch();
    watch.hear(puts(&[2, 3]), true);
    watch.hear(puts(&[3]), true);
    assert!(told(&mut messages).is_empty());
    watch.hear(puts(&[3]), false);
    assert_eq!(told(&mut messages), [[2, 3, 3, 3]]);
}

/// The next stream tells all of it again.
#[test]
fn what_a_stream_told_in_part_when_it_broke_is_told_once() {
    let (mut watch, mut messages) = watch();
    watch.creation(1, Kind::Everything);
    watch.hear(puts(&[2, 3]), true);
    watch.creation(1, Kind::Everything);
    watch.hear(puts(&[2, 3]), true);
    watch.hear(puts(&[4]), false);
    assert_eq!(told(&mut messages), [[2, 3, 4]]);
}

#[test]
fn a_subscriber_that_is_too_slow_finds_a_gap_and_no_hole() {
    let (mut watch, mut slow) = watch();
    let (sender, mut quick) = channel(QUEUE);
    watch.subscribers.push((2, sender));
    let last = 2 * i64::try_from(QUEUE).unwrap_or(0);
    for revision in 2..last {
        watch.hear(puts(&[revision]), false);
        assert_eq!(told(&mut quick), [[revision]]);
    }
    let heard = told(&mut slow).concat();
    assert!(heard.len() >= QUEUE && heard.iter().copied().eq((2..).take(heard.len())), "{heard:?}");
    assert!(matches!(slow.next().now_or_never(), Some(None)), "it waits for what it missed");
}
