use std::sync::mpsc;

use tokio::sync::mpsc::unbounded_channel;

use super::*;

const LEASE: i64 = 7;

/// A key that is there, and what it takes to use it.
struct Rig {
    key: Key,
    commands: UnboundedSender<Command>,
    owned: KeptKey,
}

impl Rig {
    fn new() -> Self {
        let (commands, _) = unbounded_channel();
        let (answer, mut answered) = oneshot::channel();
        let prefix = Arc::new(Prefix::of_name(b"services").unwrap());
        let mut key = Key::new(prefix, b"services/a".as_slice().into(), b"0".as_slice().into(), answer);
        assert!(matches!(key.op(LEASE).unwrap().what, What::Take(_)));
        assert_eq!(key.settle(Outcome::Done(10), LEASE, &commands), Next::Go);
        let owned = answered.try_recv().unwrap().unwrap();
        Self { key, commands, owned }
    }

    fn update(&mut self, value: &str) -> mpsc::Receiver<Result<()>> {
        let (told, tells) = mpsc::channel();
        self.key.update(value.as_bytes().into(), Box::new(move |result| told.send(result).unwrap()));
        tells
    }

    /// What is put now.
    fn puts(&mut self) -> Option<String> {
        match self.key.op(LEASE)?.what {
            What::Take(value) | What::Put { value, .. } => Some(String::from_utf8(value.to_vec()).unwrap()),
            What::Delete { .. } => panic!("it is deleted"),
        }
    }

    fn done(&mut self, revision: i64) -> Next {
        self.key.settle(Outcome::Done(revision), LEASE, &self.commands)
    }

    fn refused(&mut self) -> Next {
        let error = Error::NoSpace { key: "services/a".into() };
        self.key.settle(Outcome::Refused(error), LEASE, &self.commands)
    }
}

#[test]
fn updates_at_once_are_one_write_and_all_are_told() {
    let mut rig = Rig::new();
    let first = rig.update("1");
    assert_eq!(rig.puts().unwrap(), "1");
    let (second, third) = (rig.update("2"), rig.update("3"));
    assert_eq!(rig.puts(), None, "a write is under way");
    assert_eq!(rig.done(11), Next::Go);
    // Whoever goes on updating keeps nobody from an answer.
    assert!(first.recv().unwrap().is_ok() && second.try_recv().is_err());
    assert_eq!(rig.puts().unwrap(), "3");
    assert_eq!(rig.done(12), Next::Go);
    assert!(second.recv().unwrap().is_ok() && third.recv().unwrap().is_ok());
    assert_eq!(rig.puts(), None);
}

#[test]
fn each_update_is_refused_by_itself() {
    let mut rig = Rig::new();
    let first = rig.update("1");
    assert_eq!(rig.puts().unwrap(), "1");
    let second = rig.update("12");
    // The next contains it.
    assert_eq!(rig.refused(), Next::Go);
    assert!(first.try_recv().is_err());
    assert_eq!(rig.puts().unwrap(), "12");
    assert_eq!(rig.refused(), Next::Go);
    assert!(matches!(second.recv().unwrap(), Err(Error::NoSpace { .. })));
    assert_eq!(rig.puts().unwrap(), "1");
    assert_eq!(rig.done(11), Next::Go);
    assert!(first.recv().unwrap().is_ok());
    let third = rig.update("13");
    assert_eq!(rig.puts().unwrap(), "13");
    assert_eq!(rig.refused(), Next::Go);
    assert!(third.recv().unwrap().is_err());
    assert_eq!(rig.puts(), None, "what is there is the last good value");
}

#[test]
fn a_put_of_somebody_else_is_heard_of_during_an_update_that_is_refused() {
    let mut rig = Rig::new();
    let update = rig.update("1");
    assert_eq!(rig.puts().unwrap(), "1");
    assert_eq!(rig.key.hear(11, Some(99), LEASE), Next::Go);
    assert_eq!(rig.refused(), Next::Forget);
    assert!(matches!(update.recv().unwrap(), Err(Error::NoSpace { .. })));
    assert_eq!(rig.owned.standing(), Standing::Superseded);
}
