//! Commits that wait for a writer, and how they are taken in groups.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{Mutex, Notify, mpsc, oneshot};

use annals::{CommitError, Committed};

use crate::group::Prepared;

/// Commits that may wait; further callers wait for a place. Two groups' worth for each writer: one being written, one behind.
pub(crate) const QUEUE_COMMITS_MAX: usize = 4 * GROUP_COMMITS_MAX;
/// The most commits in a group: beyond this, a sync less per commit is not worth the wait of the first for the last.
const GROUP_COMMITS_MAX: usize = 512;
/// A group takes no further commit once it has this many rows.
const GROUP_ROWS_MAX: usize = 4_096;
/// A group takes no further commit once it has this many bytes of payload.
const GROUP_BYTES_MAX: usize = 8 << 20;

pub(crate) type Outcome = Result<Committed, CommitError>;

/// A commit and who waits for it. Nobody may: then the commit is written all the same.
pub(crate) struct Submission {
    pub(crate) commit: Prepared,
    pub(crate) answer: oneshot::Sender<Outcome>,
    pub(crate) passage: Passage,
}

/// How many commits are under way, and whether they come one at a time.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    under_way: AtomicUsize,
    in_groups: AtomicBool,
}

/// One of those under way, until this is dropped.
pub(crate) struct Passage(Arc<Traffic>);

impl Traffic {
    /// One more is under way; and whether it is the only one, and those before came alone, too. When many are answered at once,
    /// the first to come back is only ahead of the others.
    pub(crate) fn enter(self: &Arc<Self>) -> (Passage, bool) {
        let before = self.under_way.fetch_add(1, Ordering::AcqRel);
        (Passage(self.clone()), before == 0 && !self.in_groups.load(Ordering::Acquire))
    }

    /// A group of so many was taken from the queue.
    pub(crate) fn came(&self, commits: usize) {
        self.in_groups.store(commits > 1, Ordering::Release);
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(crate) struct Queue {
    submissions: Mutex<mpsc::Receiver<Submission>>,
    /// A group was full: there may be enough for another writer.
    long: Notify,
    /// The first writer has ended.
    done: Notify,
}

impl Queue {
    pub(crate) fn new(submissions: mpsc::Receiver<Submission>) -> Self {
        Self { submissions: Mutex::new(submissions), long: Notify::new(), done: Notify::new() }
    }

    /// The next group: what is waiting, with no wait for more. `None` at the end.
    pub(crate) async fn next(&self) -> Option<Vec<Submission>> {
        let mut submissions = self.submissions.lock().await;
        match submissions.recv().await {
            Some(first) => Some(self.group(first, &mut submissions)),
            None => {
                self.done.notify_one();
                None
            }
        }
    }

    /// The next group for a second writer, who is there for what the first has no room for: with few commits under way, two
    /// would take turns with half of them each, for twice as many round trips.
    pub(crate) async fn overflow(&self) -> Option<Vec<Submission>> {
        loop {
            tokio::select! {
                () = self.long.notified() => {}
                () = self.done.notified() => return None,
            }
            let mut submissions = self.submissions.lock().await;
            if let Ok(first) = submissions.try_recv() {
                return Some(self.group(first, &mut submissions));
            }
        }
    }

    fn group(&self, first: Submission, submissions: &mut mpsc::Receiver<Submission>) -> Vec<Submission> {
        let (mut rows, mut bytes) = (first.commit.rows, first.commit.bytes);
        let mut group = vec![first];
        while group.len() < GROUP_COMMITS_MAX && rows < GROUP_ROWS_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(next) = submissions.try_recv() else { return group };
            rows += next.commit.rows;
            bytes += next.commit.bytes;
            group.push(next);
        }
        self.long.notify_one();
        group
    }
}
