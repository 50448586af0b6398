"""What is read from the text of programs compiled for TPU; tests/slow compiles real ones."""

from one_jax.runtime import compiled_program

NAME = 'jit(call)/shard_map/'
TEXT = f"""
  %f.1 = f32[4]{{0}} fusion(%a), backend_config={{"window_config":{{"estimated_cycles":"100",
  %f.2 = f32[4]{{0}} fusion(%a), metadata={{op_name="{NAME}jvp(MultiBranch)/trunk/trunk.stem/conv1/c"}}, backend_config={{"estimated_cycles":"1000"}}
  %f.3 = f32[4]{{0}} fusion(%a), metadata={{op_name="{NAME}transpose(jvp(MultiBranch))/MultiBranch._run_heads/vmap(head.<lambda>)/head/fc/dot"}}, backend_config={{"estimated_cycles":"20000"}}
  %f.4 = f32[4]{{0}} fusion(%a), metadata={{op_name="{NAME}transpose(jvp(MultiBranch))/head_1/fc/dot"}}, backend_config={{"estimated_cycles":"300000"}}
  %f.5 = f32[4]{{0}} fusion(%a), metadata={{op_name="{NAME}optimizer/mul"}}, backend_config={{"estimated_cycles":"4000000"}}
  %f.6 = f32[4]{{0}} fusion(%a), metadata={{op_name="{NAME}input/jit(_randint)/add"}}, backend_config={{"estimated_cycles":"7"}}
  %f.7 = f32[4]{{0}} add(%a, %b), metadata={{op_name="{NAME}optimizer/mul"}}
  %all-reduce.62 = (f32[3]{{0:T(128)S(1)}}, bf16[32,3]{{0,1:T(4,128)S(1)}}, /*index=5*/f32[]{{:T(128)}}) all-reduce(%a, %b, %c), to_apply=%add
  %all-reduce-start.1 = u32[2,1]{{0}} all-reduce-start(%d), to_apply=%add
  %get-tuple-element.1 = f32[3]{{0}} get-tuple-element(%all-reduce.62), index=0
"""  # noqa: E501


def test_estimated_cycles_are_summed_by_part_and_direction():
    assert compiled_program.estimated_cycles(TEXT) == {
        ('loss and rest', 'forward'): 100,
        ('trunk', 'forward'): 1000,
        ('heads', 'backward'): 320_000,
        ('optimizer', 'forward'): 4_000_000,
        ('input', 'forward'): 7,
    }


def test_all_reduces_count_each_once_with_its_bytes():
    assert compiled_program.all_reduces(TEXT) == (2, 3 * 4 + 32 * 3 * 2 + 4 + 2 * 4)
    assert compiled_program.all_reduces('') == (0, 0)
