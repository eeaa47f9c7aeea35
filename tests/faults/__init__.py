"""What can go wrong on one machine, by its number in the list of faults, and where it is tested.

"slow" is a parameter that runs with ``-m slow``: the same, more often.

A process
    F1   killed at each place
         faults/test_failpoints.py (slow: 5 times, 2, 3 and 8 ranks)
    F2   killed at any moment
         faults/test_chaos.py (bench/chaos.py for more)
         faults/test_death.py
    F3   several killed at once
         faults/test_launched_death.py (slow: 50 times)
         faults/test_death.py::test_two_ranks_killed_at_once_fail_the_rest
         faults/test_joining.py
    F4   crashes, leaves with 0
         faults/test_death.py::test_each_way_to_leave_fails_the_others (slow)
    F5   stopped
         faults/test_death.py::test_stopped_rank_is_not_dead_and_the_group_goes_on
         faults/test_death.py::test_stopped_rank_is_named_as_stopped_and_after_six_times_as_long_again
         unit/test_patience.py
         top/test_top.py
    F6   alive but stuck
         faults/test_death.py::test_late_rank_prints_its_stack_once
    F7   out of memory
         spawn/test_memory.py
         faults/test_surroundings.py
    F8   raises
         faults/test_death.py::test_each_way_to_leave_fails_the_others (slow)
         faults/test_death.py::test_exception_before_the_first_collective_reaches_the_others
    F9   leaves early
         faults/test_death.py
         spawn/test_group.py
    F10  the launcher is killed
         spawn/test_signals.py::test_killed_launcher_leaves_nothing_behind
         faults/test_launched_death.py
    F11  ^C, SIGTERM, SIGHUP
         spawn/test_signals.py
         shm/test_jit.py::test_interrupt_ends_a_jitted_wait
    F12  signals all the time
         faults/test_death.py::test_signals_during_collectives_do_not_change_results (slow)
    F13  forks
         faults/test_death.py::test_forked_child_cannot_use_the_communicator_nor_disturb_it
         faults/test_death.py::test_child_that_ends_as_a_program_does_disturbs_nobody
    F14  two threads
         faults/test_threads.py::test_threads_that_race_for_a_communicator_do_not_corrupt_it
    F15  pids used again (slow: 20 times)
         faults/test_surroundings.py::test_process_that_got_the_pid_of_a_dead_rank_is_not_taken_for_it
    F16  starved
         faults/test_surroundings.py::test_starved_rank_is_late_and_not_dead (slow: 64 ranks)
    F17  clock jumps
         faults/test_surroundings.py::test_time_of_day_does_not_matter

Shared memory
    F20  /dev/shm is full
         faults/test_small_shared_memory.py (slow: 1 GiB)
         faults/test_unnamed.py
    F21  system calls refused
         faults/test_refusals.py
    F22  limits met (slow: mappings)
         faults/test_surroundings.py::test_limit_that_is_met_is_a_clear_error_and_nothing_is_left
    F23  n-th system call fails
         faults/test_system_calls.py
         spawn/test_refused.py (slow: every call)
    F24  name of a dead run
         faults/test_joining.py::test_segment_of_a_dead_run_is_replaced_with_one_line_of_notice
    F25  name of a live run
         faults/test_joining.py::test_segment_of_a_live_run_is_refused_and_left_alone
    F26  somebody else's file
         unit/test_segment.py
    F27  cut off, made longer
         unit/test_segment.py
         faults/test_unnamed.py::test_nobody_can_truncate_the_segment
         faults/test_joining.py::test_segment_that_is_cut_off_during_joining_is_an_error_and_not_sigbus
    F28  every flip of the header
         faults/test_damage.py::test_every_flip_of_one_byte_of_the_header_is_refused_or_harmless
    F29  random words in a run
         faults/test_damage.py::test_random_words_during_a_run_end_in_errors_and_not_in_crashes
    F30  ranks that do not fit
         faults/test_joining.py
         unit/test_env.py
    F31  regions, odd arrays (slow: 100,000 of them)
         faults/test_system_calls.py::test_regions_made_and_closed_in_a_loop_leave_nothing
         conformance/test_shared_region.py
         conformance/test_arguments.py

Calls
    F40  ranks that differ
         faults/test_mismatch.py (slow: 2,000 cases)
         conformance/test_mismatch.py
    F41  wrong counts
         unit/test_validate.py (--hypothesis-profile=long: 5,000 each)
         conformance/test_arguments.py
    F42  special numbers
         conformance/test_allreduce.py
         shm/test_algorithms.py
         unit/test_rows.py
         interchange/test_same_bits.py
"""
