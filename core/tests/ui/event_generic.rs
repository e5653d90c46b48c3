#[derive(annals::Event)]
enum Generic<T> {
    Placed { order: T },
}

#[derive(annals::Event)]
enum Borrowed<'a> {
    Placed { order: &'a str },
}

#[derive(annals::Event)]
enum Bounded
where
    String: Clone,
{
    Placed,
}

fn main() {}
