//! The queue of commits that wait for a writer, and their division into groups.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{Mutex, Notify, mpsc, oneshot};

use annals::{CommitError, Committed};

use crate::group::Prepared;

/// The number of commits that may wait; further callers wait for a place. Two groups per writer: one being written,
/// one behind it.
pub(crate) const QUEUE_COMMITS_MAX: usize = 4 * GROUP_COMMITS_MAX;
/// The most commits in a group: beyond this, saving a sync does not justify that the first commit waits for the last.
const GROUP_COMMITS_MAX: usize = 512;
/// A group takes no further commit once it has this many rows.
const GROUP_ROWS_MAX: usize = 4_096;
/// A group takes no further commit once it has this many bytes of payload.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// The number of rows waiting behind one group that justifies a second group at the same time: the server spends more
/// time on so many rows than on the commit and the round trip around them.
const GROUP_ROWS_MIN: usize = 256;
/// Each waiting commit counts for this many rows in addition to its own: a caller waits for it.
const ROWS_PER_CALLER: usize = 7;

pub(crate) type Outcome = Result<Committed, CommitError>;

/// A commit and its caller. If the caller is gone, the commit is written all the same.
pub(crate) struct Submission {
    pub(crate) commit: Prepared,
    pub(crate) answer: oneshot::Sender<Outcome>,
    pub(crate) passage: Passage,
}

/// The commits in flight, and their pattern of arrival.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    commits: AtomicUsize,
    /// The rows of the waiting commits, including those counted for their callers.
    rows: AtomicUsize,
    /// Signals that there may be enough rows for a second writer.
    long: Notify,
    /// Whether the last group had more than one commit.
    in_groups: AtomicBool,
}

/// A commit in flight, until this guard is dropped.
pub(crate) struct Passage {
    traffic: Arc<Traffic>,
    /// The rows counted while the commit waits.
    rows: usize,
}

impl Traffic {
    /// Counts a commit as in flight. Also returns whether it is the only commit in flight and the commits before it
    /// came alone, too: when many callers are answered at once, the first to return is only ahead of the others.
    pub(crate) fn enter(self: &Arc<Self>) -> (Passage, bool) {
        let before = self.commits.fetch_add(1, Ordering::AcqRel);
        let passage = Passage { traffic: self.clone(), rows: 0 };
        (passage, before == 0 && !self.in_groups.load(Ordering::Acquire))
    }
}

impl Passage {
    /// Counts the commit as waiting from now on, with this many rows.
    pub(crate) fn wait(&mut self, rows: usize) {
        let rows = rows + ROWS_PER_CALLER;
        self.rows = rows;
        let before = self.traffic.rows.fetch_add(rows, Ordering::AcqRel);
        if before < GROUP_ROWS_MIN && before + rows >= GROUP_ROWS_MIN {
            self.traffic.long.notify_one();
        }
    }

    fn wait_no_longer(&mut self) {
        self.traffic.rows.fetch_sub(std::mem::take(&mut self.rows), Ordering::AcqRel);
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.wait_no_longer();
        self.traffic.commits.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(crate) struct Queue {
    submissions: Mutex<mpsc::Receiver<Submission>>,
    traffic: Arc<Traffic>,
    /// Signals that the first writer has ended.
    done: Notify,
}

impl Queue {
    pub(crate) fn new(submissions: mpsc::Receiver<Submission>, traffic: Arc<Traffic>) -> Self {
        Self { submissions: Mutex::new(submissions), traffic, done: Notify::new() }
    }

    /// Returns the next group: all waiting commits, without waiting for more. `None` at the end.
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

    /// Returns the next group for a second writer, which serves what is too much for one. With few rows in flight, two
    /// writers would alternate with half of the rows each, for twice as many round trips.
    pub(crate) async fn overflow(&self) -> Option<Vec<Submission>> {
        loop {
            tokio::select! {
                () = self.traffic.long.notified() => {}
                () = self.done.notified() => return None,
            }
            // The first writer holds the lock while it waits for commits: then no commit waits.
            let Ok(mut submissions) = self.submissions.try_lock() else { continue };
            if self.traffic.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN
                && let Ok(first) = submissions.try_recv()
            {
                return Some(self.group(first, &mut submissions));
            }
        }
    }

    fn group(&self, mut first: Submission, submissions: &mut mpsc::Receiver<Submission>) -> Vec<Submission> {
        first.passage.wait_no_longer();
        let (mut rows, mut bytes) = (first.commit.rows, first.commit.bytes);
        let mut group = vec![first];
        while group.len() < GROUP_COMMITS_MAX && rows < GROUP_ROWS_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(mut next) = submissions.try_recv() else { break };
            next.passage.wait_no_longer();
            rows += next.commit.rows;
            bytes += next.commit.bytes;
            group.push(next);
        }
        self.traffic.in_groups.store(group.len() > 1, Ordering::Release);
        // The remaining commits may still justify a second group.
        if self.traffic.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN {
            self.traffic.long.notify_one();
        }
        group
    }
}
