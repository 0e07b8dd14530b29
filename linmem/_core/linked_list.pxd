# Circular doubly linked lists. Each listed struct has a link as a member; a struct with several links can be in several
# lists. Layer 0: imports nothing of linmem.
#
# The head of a list is a link whose owner is NULL. A loop over the list ends at the link whose owner is NULL.

cdef struct link:
    link* next              # in the head: the first
    link* previous          # in the head: the last
    void* owner             # the struct that is listed; NULL: this is the head


cdef inline void list_init(link* head) noexcept nogil:
    head.next = head.previous = head
    head.owner = NULL


cdef inline void list_add_first(link* head, link* to_add, void* owner) noexcept nogil:
    to_add.owner = owner
    to_add.previous = head
    to_add.next = head.next
    head.next.previous = to_add
    head.next = to_add


cdef inline void list_remove(link* to_remove) noexcept nogil:
    """The link itself still points to its former neighbours, so a walk that stands on it can go on."""
    cdef link* after = to_remove.next
    cdef link* before = to_remove.previous
    after.previous = before
    before.next = after
